"""What the cells of a table found: figures of each, means and errors over seeds, and both as CSV files."""

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
"""Data set and labeled share."""


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
        return _last(self.mAP_by_epoch(min_positives))

    def best_on_test(self, min_positives: int) -> float:
        """The best epoch's, chosen on the test images themselves, as CAP reports: too high by that choice."""
        return max(self.mAP_by_epoch(min_positives).values())

    def with_zeros(self, min_positives: int) -> float:
        """The number to report under CAP's other convention: over all classes, one without positives counts 0."""
        return 100 * _last(self.metric("val/mAP_with_zeros"))

    def envelope(self) -> float:
        """The number to report under the interpolated AP, over all classes with a test positive; NaN if unknown."""
        values = self.metric("val/mAP_envelope")
        return 100 * _last(values) if values else math.nan


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


def _last(by_epoch: Mapping[int, float]) -> float:
    return by_epoch[max(by_epoch)]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers come ready as text."""
    lines = [" | ".join(map(str, line)) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def write_cells(file: Path, table: Table, finished: Sequence[Finished], min_positives: int) -> None:
    """A line a run, mAP and F1 in %."""
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
    """Quality of the pseudo-labels of each epoch against the hidden labels, in %."""
    names = ("CF1", "precision", "recall", "coverage")
    with replacing(file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["system", "data", "p", "seed", "epoch", *names])
        for f in finished:
            metrics = [f.metric(f"pseudo/{name}") for name in names]
            for epoch in sorted(metrics[0]):
                values = (f"{100 * metric[epoch]:.3f}" if epoch in metric else "" for metric in metrics)
                out.writerow([f.cell.row.label, f.cell.data, f.cell.share, f.cell.seed, epoch, *values])
