"""Results of the cells of a table: values per cell, means and standard errors over seeds, and CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbsa_lightning.io.files import replacing
from cbsa_lightning.reproduce.paper import Table
from cbsa_lightning.reproduce.recipes import Cell

Column = tuple[str, float]
"""Data set and labeled fraction."""


@dataclass(frozen=True)
class Finished:
    """A finished cell with the result of its run.

    All mAP values are in %. Except in :meth:`with_zeros` and :meth:`envelope`, they are means over the classes with at
    least ``min_positives`` test positives.
    """

    cell: Cell
    found: Mapping[str, Any]

    def metric(self, name: str) -> dict[int, float]:
        """Returns the values of a metric by epoch, without undefined values."""
        values = self.found["history"].get(name, {})
        return {int(epoch): value for epoch, value in values.items() if value is not None}

    def mAP_by_epoch(self, min_positives: int) -> dict[int, float]:
        """Returns the test mAP of the averaged weights by validated epoch; NaN if no class has enough positives."""
        counted = [name for name, number in self.found["positives"].items() if number >= min_positives]
        by_class = [self.metric(f"val/AP/{name}") for name in counted]
        return {
            epoch: 100 * float(np.mean([ap[epoch] for ap in by_class])) if counted else math.nan
            for epoch in self.metric("val/mAP_with_zeros")
        }

    def mAP(self, min_positives: int) -> float:
        """Returns the mAP to report: that of the averaged weights after the last epoch."""
        return _last(self.mAP_by_epoch(min_positives))

    def best_on_test(self, min_positives: int) -> float:
        """Returns the highest mAP of any epoch, which is biased upward because the test images select the epoch.

        As in CAP's program, the better of raw and averaged weights counts. The mAP of the raw weights is available over
        all classes with test positives, so they are omitted if ``min_positives`` is above 1.
        """
        raw = self.metric("val/mAP_raw").values() if min_positives <= 1 else ()
        return max([*self.mAP_by_epoch(min_positives).values(), *(100 * value for value in raw)])

    def with_zeros(self, min_positives: int) -> float:
        """Returns the mAP over all classes, with AP 0 for classes without test positives (CAP's convention)."""
        return 100 * _last(self.metric("val/mAP_with_zeros"))

    def envelope(self) -> float:
        """Returns the mAP with interpolated AP, over all classes with test positives; NaN if it was not measured."""
        values = self.metric("val/mAP_envelope")
        return 100 * _last(values) if values else math.nan


class Means:
    """Mean and standard error over the seeds for each row and column.

    Args:
        finished: Finished cells.
        figure: Computes the value of a cell; NaN values are ignored.
    """

    def __init__(self, finished: Iterable[Finished], figure: Callable[[Finished], float]) -> None:
        self.by_seed: dict[tuple[str, Column], dict[int, float]] = {}
        for f in finished:
            place, value = (f.cell.row.label, (f.cell.data, f.cell.share)), figure(f)
            if not math.isnan(value):
                self.by_seed.setdefault(place, {})[f.cell.seed] = value

    def mean(self, label: str, column: Column) -> float | None:
        """Returns the mean, or None if no seed is finished."""
        found = self.by_seed.get((label, column))
        return float(np.mean(list(found.values()))) if found else None

    def error(self, label: str, column: Column) -> float | None:
        """Returns the standard error of the mean, or None for fewer than two seeds."""
        found = self.by_seed.get((label, column), {})
        return standard_error(found.values())

    def text(self, label: str, column: Column) -> str:
        """Returns mean and standard error as text, such as "69.1 ± 0.1"."""
        return mean_and_error(self.by_seed.get((label, column), {}).values())


def standard_error(values: Iterable[float]) -> float | None:
    """Returns the standard error of the mean, or None for fewer than two values."""
    found = list(values)
    return float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None


def mean_and_error(values: Iterable[float], sign: str = "") -> str:
    """Returns mean and standard error as text, or "-" without values. ``sign="+"`` adds a plus sign."""
    found = list(values)
    if not found:
        return "-"
    error = standard_error(found)
    return f"{np.mean(found):{sign}.1f}" + (f" ± {error:.1f}" if error is not None else "")


def _last(by_epoch: Mapping[int, float]) -> float:
    return by_epoch[max(by_epoch)]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table; numbers must already be formatted."""
    lines = [" | ".join(map(str, line)) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def write_cells(file: Path, table: Table, finished: Sequence[Finished], min_positives: int) -> None:
    """Writes a CSV file with one row per run; mAP and F1 are in %."""
    head = [
        *("system", "data", "p", "seed", "mAP", "mAP_with_zeros", "best_on_test", "CF1_at_half", "OF1_at_half"),
        *("mAP_envelope", "pseudo_CF1", "ms_per_image", "paper_mAP", "device", "folder"),
    ]
    with replacing(file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(head)
        for f in finished:
            cell = f.cell
            names = ("val/CF1_at_half", "val/OF1_at_half", "val/mAP_envelope", "pseudo/CF1")
            last = [f.metric(name) for name in names]
            ms = f.metric("time/ms_per_image")
            figures = [f.mAP(min_positives), f.with_zeros(min_positives), f.best_on_test(min_positives)]
            out.writerow(
                [
                    *(cell.row.label, cell.data, cell.share, cell.seed),
                    *(f"{value:.3f}" for value in figures),
                    *(f"{100 * _last(values):.3f}" if values else "" for values in last),
                    _last(ms) if ms else "",
                    table.paper(cell.row.label, cell.data, cell.share),
                    *(f.found["device"], cell.folder),
                ]
            )


def write_pseudo_labels(file: Path, finished: Sequence[Finished]) -> None:
    """Writes a CSV file with the quality of the pseudo-labels by epoch in %, measured against the hidden labels."""
    names = ("CF1", "precision", "recall", "coverage")
    with replacing(file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["system", "data", "p", "seed", "epoch", *names])
        for f in finished:
            metrics = [f.metric(f"pseudo/{name}") for name in names]
            for epoch in sorted(metrics[0]):
                values = (f"{100 * metric[epoch]:.3f}" if epoch in metric else "" for metric in metrics)
                out.writerow([f.cell.row.label, f.cell.data, f.cell.share, f.cell.seed, epoch, *values])
