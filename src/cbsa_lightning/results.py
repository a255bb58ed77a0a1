"""What the cells of a table found: means and errors over seeds, as Markdown, CSV and pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from cbsa_lightning.cells import Cell
from cbsa_lightning.cost import Cost
from cbsa_lightning.paper import OURS, PAPER_COSTS, PAPER_ERRORS, Table

Column = tuple[str, float]
"""Data set and labelled share."""


@dataclass(frozen=True)
class Finished:
    """A finished cell with what its run told.

    All mAP are in percent. They average the classes with at least ``min_positives`` test positives, but for
    :meth:`with_zeros`.
    """

    cell: Cell
    found: Mapping[str, Any]

    def metric(self, name: str) -> dict[int, float]:
        """Values of a metric by epoch, undefined ones left out."""
        values = self.found["history"].get(name, {})
        return {int(epoch): value for epoch, value in values.items() if value is not None}

    def mAP_by_epoch(self, min_positives: int) -> dict[int, float]:
        """Test mAP of the averaged weights in each epoch that was validated; NaN where no class counts."""
        counted = [name for name, number in self.found["positives"].items() if number >= min_positives]
        by_class = [self.metric(f"val/AP/{name}") for name in counted]
        return {
            epoch: 100 * float(np.mean([ap[epoch] for ap in by_class])) if counted else math.nan
            for epoch in self.metric("val/mAP_with_zeros")
        }

    def mAP(self, min_positives: int) -> float:
        """The number to report: the averaged weights after the last epoch."""
        values = self.mAP_by_epoch(min_positives)
        return values[max(values)]

    def best_on_test(self, min_positives: int) -> float:
        """The best epoch's, chosen on the test images themselves, as CAP reports: too high by that choice."""
        return max(self.mAP_by_epoch(min_positives).values())

    def with_zeros(self, min_positives: int) -> float:
        """The number to report under CAP's other convention: over all classes, one without positives counts 0."""
        values = self.metric("val/mAP_with_zeros")
        return 100 * values[max(values)]


class Means:
    """Mean and standard error over the seeds of each row and column, of some figure of a cell."""

    def __init__(self, finished: Iterable[Finished], figure: Callable[[Finished], float]) -> None:
        self.by_seed: dict[tuple[str, Column], dict[int, float]] = {}
        for f in finished:
            place, value = (f.cell.row.label, (f.cell.data, f.cell.share)), figure(f)
            if not math.isnan(value):
                self.by_seed.setdefault(place, {})[f.cell.seed] = value

    def mean(self, label: str, column: Column) -> float | None:
        """None where no seed is finished."""
        found = self.by_seed.get((label, column))
        return float(np.mean(list(found.values()))) if found else None

    def error(self, label: str, column: Column) -> float | None:
        """Standard error of the mean, None for fewer than two seeds."""
        found = self.by_seed.get((label, column), {})
        return standard_error(found.values())

    def text(self, label: str, column: Column) -> str:
        """Such as "69.1 ± 0.1"."""
        return mean_and_error(self.by_seed.get((label, column), {}).values())


def standard_error(values: Iterable[float]) -> float | None:
    """Standard error of the mean, None for fewer than two values."""
    found = list(values)
    return float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None


def mean_and_error(values: Iterable[float], sign: str = "") -> str:
    """Mean and standard error in text; "-" for no value. ``sign`` "+" shows that of a positive mean."""
    found = list(values)
    if not found:
        return "-"
    error = standard_error(found)
    return f"{np.mean(found):{sign}.1f}" + (f" ± {error:.1f}" if error is not None else "")


def write_table(
    file: Path,
    table: Table,
    cells: Sequence[Cell],
    finished: Sequence[Finished],
    problems: Mapping[str, str],
    min_positives: int,
    settings: Mapping[str, str],
    cost: Mapping[str, Cost],
) -> None:
    """Writes ``file``, and beside it ``.csv``, ``.png``, ``_pseudo_labels.csv`` and ``_pseudo_labels.png``.

    Args:
        file: Markdown file.
        table: The paper's.
        cells: All cells that the table wants.
        finished: Those that are finished.
        problems: Why some could not be run, by name.
        min_positives: Test positives that a class needs to count.
        settings: Overlays that every cell ran under, by name.
        cost: Of a step of each system, where it was measured.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = list(dict.fromkeys(cell.row.label for cell in cells))
    columns = list(dict.fromkeys((cell.data, cell.share) for cell in cells))
    means = Means(finished, lambda f: f.mAP(min_positives))
    parts = [
        f"# Table {table.number}: {table.title}",
        _introduction(cells, finished, min_positives),
        _grid(rows, columns, lambda row, column: _beside_paper(table, means, row, column)),
        _costs(cost),
        _order(table, means, rows, columns),
        _against_ours(table, means, rows, columns),
        "## Best on test\n\nThe averaged weights' highest test mAP of any epoch, much as CAP reports. It is chosen on "
        "the test images, so it is too high; it is here to compare with papers that report it.",
        _grid(rows, columns, Means(finished, lambda f: f.best_on_test(min_positives)).text),
        "## All classes, absent ones counting 0\n\nThe mean over all classes; one without test positives has AP 0 (the "
        "convention of CAP and torchmetrics).",
        _grid(rows, columns, Means(finished, lambda f: f.with_zeros(min_positives)).text),
        _list("## Could not be run", problems),
        "## Settings of every cell\n\nOver its method's overlay in `configs/methods`:",
        *(f"`{name}`\n\n```yaml\n{text.strip()}\n```" for name, text in settings.items()),
    ]
    file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    _write_cells(file.with_suffix(".csv"), table, finished, min_positives)
    _write_pseudo_labels(file.with_name(f"{file.stem}_pseudo_labels.csv"), finished)
    if finished:
        draw_table(table, means, rows, columns).savefig(file.with_suffix(".png"), dpi=120)
        draw_pseudo_labels(finished, rows).savefig(file.with_name(f"{file.stem}_pseudo_labels.png"), dpi=120)


def _introduction(cells: Sequence[Cell], finished: Sequence[Finished], min_positives: int) -> str:
    seeds = sorted({cell.seed for cell in cells})
    counted = "with a test positive" if min_positives == 1 else f"with {min_positives} test positives or more"
    text = (
        f"Test mAP in % over the classes {counted}: averaged weights after the last epoch; mean over seeds "
        f"{', '.join(map(str, seeds))} and its standard error where there are two or more; in brackets what the paper "
        f"reports and our difference from it. {len(finished)} of {len(cells)} cells are finished"
    )
    if finished:
        devices = sorted({f.found["device"] for f in finished})
        measured = sorted({f.found["measured_on"] for f in finished})
        text += f", on {', '.join(devices)}; measured on {' and '.join(measured)}"
    return ". ".join([text, *_unlike(finished)]) + "."


def _unlike(finished: Sequence[Finished]) -> Iterator[str]:
    """What should be the same in cells that are set side by side, and is not: the recipe alone does not tell."""
    for data in dict.fromkeys(f.cell.data for f in finished):
        images = {str(f.found["images"]) for f in finished if f.cell.data == data}
        if len(images) > 1:
            yield f"**The images or labels of {data} changed between its cells**: delete the older ones' folders"
    versions = sorted({" ".join(map(" ".join, sorted(f.found["versions"].items()))) for f in finished})
    if len(versions) > 1:
        yield f"**Cells were made with different versions**: {'; '.join(versions)}"


def _grid(rows: Sequence[str], columns: Sequence[Column], text: Callable[[str, Column], str]) -> str:
    head = ["system", *(f"{data} p = {share:.2f}" for data, share in columns)]
    lines = [head, ["---"] * len(head), *([row, *(text(row, column) for column in columns)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _beside_paper(table: Table, means: Means, row: str, column: Column) -> str:
    ours, theirs = means.mean(row, column), table.paper(row, *column)
    text = means.text(row, column)
    if theirs is None:
        return text
    reported = f"{theirs:.2f}"
    if table.number == 10:
        reported += f" ± {dict(zip(table.shares, PAPER_ERRORS, strict=True))[column[1]]}"
    return f"{text} ({reported})" if ours is None else f"{text} ({reported}, {ours - theirs:+.1f})"


def _order(table: Table, means: Means, rows: Sequence[str], columns: Sequence[Column]) -> str:
    """How far the order of the systems agrees with the paper's, column by column."""
    lines = []
    for data, share in columns:
        both = [
            (ours, theirs)
            for row in rows
            if (ours := means.mean(row, (data, share))) is not None
            and (theirs := table.paper(row, data, share)) is not None
        ]
        if len(both) > 2:
            tau = kendalltau(*zip(*both, strict=True)).statistic
            lines.append(f"{data} p = {share:.2f}: {tau:+.2f} ({len(both)} systems)")
    if not lines:
        return ""
    return (
        "Order of the systems against the paper's, Kendall's tau (1 the same, 0 unrelated, -1 reversed): "
        + "; ".join(lines)
    )


def _against_ours(table: Table, means: Means, rows: Sequence[str], columns: Sequence[Column]) -> str:
    """The last row minus each other one, seed by seed."""
    last = rows[-1]

    def difference(row: str, column: Column) -> str:
        mine, other = (means.by_seed.get((label, column), {}) for label in (last, row))
        return mean_and_error((mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())), "+")

    if len(rows) < 2:
        return ""
    return f"## {last} minus each other system\n\nOn the same seeds, points of mAP:\n\n" + _grid(
        rows[:-1], columns, difference
    )


def _costs(cost: Mapping[str, Cost]) -> str:
    """Milliseconds and gigabytes an image, as they are and beside the paper's as multiples of its own method's."""
    if not cost:
        return ""
    head = ["system", "ms/image", "GB/image"]
    own, theirs = cost.get(OURS), PAPER_COSTS[OURS]
    lines = []
    for label, c in cost.items():
        line = [label, f"{c.ms:.2f}", f"{c.gb:.3f}"]
        if own is not None:
            paper = PAPER_COSTS.get(label)
            times = [f" ({of / whole:.2f})" for of, whole in zip(paper, theirs, strict=True)] if paper else ["", ""]
            line += [f"{c.ms / own.ms:.2f}{times[0]}", f"{c.gb / own.gb:.2f}{times[1]}"]
        lines.append(line)
    if own is not None:
        head += [f"time, multiple of {OURS} (paper)", f"memory, multiple of {OURS} (paper)"]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
    return (
        "## Cost\n\nOf a training step of the second stage, least of three rounds in which all systems took turns; "
        "memory is torch's peak on a GPU, else what the process grew by while training. The paper's: one RTX 3090, "
        f"COCO.\n\n{text}"
    )


def _list(title: str, entries: Mapping[str, str]) -> str:
    return "\n".join([title, "", *(f"- {name}: {text}" for name, text in entries.items())]) if entries else ""


def _write_cells(file: Path, table: Table, finished: Sequence[Finished], min_positives: int) -> None:
    head = [
        *("system", "data", "p", "seed", "mAP", "mAP_with_zeros", "best_on_test", "CF1", "OF1"),
        *("pseudo_CF1", "ms_per_image", "paper_mAP", "device", "folder"),
    ]
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(head)
        for f in finished:
            cell = f.cell
            last = [_last(f, name) for name in ("val/CF1", "val/OF1", "pseudo/CF1")]
            figures = [f.mAP(min_positives), f.with_zeros(min_positives), f.best_on_test(min_positives)]
            out.writerow(
                [
                    *(cell.row.label, cell.data, cell.share, cell.seed),
                    *(f"{value:.3f}" for value in figures),
                    *("" if value is None else f"{100 * value:.3f}" for value in last),
                    _last(f, "time/ms_per_image"),
                    table.paper(cell.row.label, cell.data, cell.share),
                    *(f.found["device"], cell.folder),
                ]
            )


def _last(f: Finished, name: str) -> float | None:
    values = f.metric(name)
    return values[max(values)] if values else None


def _write_pseudo_labels(file: Path, finished: Sequence[Finished]) -> None:
    """Quality of the pseudo-labels of each epoch against the hidden labels, in %."""
    names = ("CF1", "precision", "recall", "coverage")
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["system", "data", "p", "seed", "epoch", *names])
        for f in finished:
            metrics = [f.metric(f"pseudo/{name}") for name in names]
            for epoch in sorted(metrics[0]):
                values = (f"{100 * metric[epoch]:.3f}" if epoch in metric else "" for metric in metrics)
                out.writerow([f.cell.row.label, f.cell.data, f.cell.share, f.cell.seed, epoch, *values])


def draw_table(table: Table, means: Means, rows: Sequence[str], columns: Sequence[Column]) -> Figure:
    """A panel a column: our mean with its error, and the paper's value."""
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
        panel.plot([paper[i] for i in told], places[told], "D", mfc="none", color="tab:orange", label="paper")
        panel.set_title(f"{column[0]}, p = {column[1]:.2f}", fontsize=10)
        panel.set_xlabel("test mAP in %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(places, rows)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle(f"Table {table.number}: {table.title}", fontsize=11, x=0.01, ha="left")
    return figure


def draw_pseudo_labels(finished: Sequence[Finished], rows: Sequence[str]) -> Figure:
    """A panel a data set and share: CF1 of each system's pseudo-labels over the epochs (Fig. 6), mean over seeds."""
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
                colour, line = styles[row]
                means = [100 * float(np.mean([run[epoch] for run in runs])) for epoch in epochs]
                panel.plot(epochs, means, line, color=colour, marker=".", label=row)
        panel.set_title(f"{column[0]}, p = {column[1]:.2f}", fontsize=10)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CF1 of the pseudo-labels in %")
    found = {text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=8)
    return figure
