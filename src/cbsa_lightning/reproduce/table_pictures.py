"""Plots of a table: the results compared with the paper's, and the quality of the pseudo-labels (Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from cbsa_lightning.reproduce.paper import Table
from cbsa_lightning.reproduce.results import Column, Finished, Means


def draw_table(table: Table, means: Means, rows: Sequence[str], columns: Sequence[Column]) -> Figure:
    """Plots, in one panel per column, the mean and standard error of each row, and the paper's value."""
    figure = Figure(figsize=(1.5 + 3.2 * len(columns), 1.4 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    places = np.arange(len(rows))[::-1]
    for panel, column in zip(panels, columns, strict=True):
        ours = [means.mean(row, column) for row in rows]
        there = [i for i, value in enumerate(ours) if value is not None]
        errors = [means.error(rows[i], column) or 0.0 for i in there]
        panel.errorbar([ours[i] for i in there], places[there], xerr=errors, fmt="o", color="tab:blue", label="here")
        paper = [table.paper(row, *column) for row in rows]
        told = [i for i, value in enumerate(paper) if value is not None]
        if told:
            panel.plot([paper[i] for i in told], places[told], "D", mfc="none", color="tab:orange", label="paper")
        panel.set_title(table.column(*column), fontsize=10)
        panel.set_xlabel("test mAP in %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(places, rows)
    panels[0].set_ylim(-0.5, len(rows) - 0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle(f"Table {table.number}: {table.title}", fontsize=11, x=0.01, ha="left")
    return figure


def draw_pseudo_labels(table: Table, finished: Sequence[Finished], rows: Sequence[str]) -> Figure:
    """Plots the CF1 of the pseudo-labels by epoch (Fig. 6), averaged over seeds; a panel per data set and fraction."""
    columns = list(dict.fromkeys((f.cell.data, f.cell.share) for f in finished))
    figure = Figure(figsize=(2 + 3.6 * len(columns), 4), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    styles = {row: (f"C{i % 10}", "-" if i < 10 else "--") for i, row in enumerate(rows)}
    for panel, column in zip(panels, columns, strict=True):
        for row in rows:
            runs = [
                f.metric("pseudo/CF1")
                for f in finished
                if (f.cell.row.label, (f.cell.data, f.cell.share)) == (row, column)
            ]
            epochs = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
            if epochs:
                color, line = styles[row]
                means = [100 * float(np.mean([run[epoch] for run in runs])) for epoch in epochs]
                panel.plot(epochs, means, line, color=color, marker=".", label=row)
        panel.set_title(table.column(*column), fontsize=10)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CF1 of the pseudo-labels in %")
    found = {text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=8)
    return figure
