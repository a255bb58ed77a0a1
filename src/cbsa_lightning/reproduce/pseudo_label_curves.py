"""Quality of the pseudo-labels by epoch or by labeled fraction (Fig. 6), from runs or from the CSV file of a table."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.io.runs import CONFIG, METRICS
from cbsa_lightning.reports.pictures import CONTEXT_COLOURS, read_history
from cbsa_lightning.reproduce.results import standard_error

METRIC = "pseudo/CF1"
_LEAST_SPAN = 10.0  # of the vertical axis, in points
_COLUMNS = ("system", "data", "p", "seed", "epoch", "CF1")


class Point(NamedTuple):
    """CF1 of the pseudo-labels of a system in one epoch, in %; data set and fraction are empty for a single run."""

    system: str
    data: str
    p: str
    seed: str
    epoch: int
    CF1: float


def read_points(places: Sequence[Path]) -> list[Point]:
    """Reads the CF1 of pseudo-labels.

    Args:
        places: Folders of runs, ``metrics.csv`` files, or ``table_N_pseudo_labels.csv`` files of `cbsa table`.

    Raises:
        ConfigError: If a folder is not that of a run.
        DataError: If a file has no CF1 of pseudo-labels.
    """
    names = _names([place for place in places if not _is_table(place)])
    found: list[Point] = []
    for place in places:
        found += _of_table(place) if _is_table(place) else _of_run(place, names[place])
    return found


def write_points(file: Path, points: Iterable[Point]) -> None:
    """Writes a CSV file with one row per system, seed and epoch; CF1 is in %."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(_COLUMNS)
        out.writerows((*point[:5], f"{point.CF1:.3f}") for point in points)


def draw_points(points: Sequence[Point], by: str = "epoch") -> Figure:
    """Plots the CF1 of each system, averaged over seeds.

    Args:
        points: The values.
        by: "epoch": one panel per data set and labeled fraction. "fraction": one panel per data set with the values of
            the last epoch; error bars are standard errors over the seeds.

    Raises:
        ConfigError: If the values have no labeled fractions to plot by.
    """
    if by == "fraction" and not all(point.p for point in points):
        raise ConfigError("--by fraction needs the table_N_pseudo_labels.csv of `cbsa table`, not folders of runs.")
    panels: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        panels[point.data, point.p if by == "epoch" else ""].append(point)
    systems = list(dict.fromkeys(point.system for point in points))
    figure = Figure(figsize=(2.6 + 3.4 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, ((data, p), some) in zip(axes, panels.items(), strict=True):
        for i, system in enumerate(systems):
            mine = [point for point in some if point.system == system]
            xs, means, errors = _by_epoch(mine) if by == "epoch" else _by_fraction(mine)
            if xs:
                color, line = CONTEXT_COLOURS[i % len(CONTEXT_COLOURS)], "-" if i < len(CONTEXT_COLOURS) else "--"
                panel.errorbar(xs, means, errors, fmt=f"{line}o", ms=3.5, color=color, label=system, capsize=2)
        if by == "epoch":
            panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(", ".join([*([data] if data else []), *([f"p = {p}"] if p else [])]), size=10)
        panel.set_xlabel("epoch" if by == "epoch" else "labeled fraction p")
        panel.grid(axis="y", color="#E4E4E4", lw=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("CF1 of the pseudo-labels, %")
    low, high = axes[0].get_ylim()
    if high - low < _LEAST_SPAN:  # otherwise, differences without meaning would fill the plot
        middle = (low + high) / 2
        axes[0].set_ylim(max(middle - _LEAST_SPAN / 2, 0), min(middle + _LEAST_SPAN / 2, 100))
    handles = {text: line for panel in axes for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _by_epoch(points: Sequence[Point]) -> tuple[list[float], list[float], None]:
    """Returns epochs and means; only epochs that all seeds have, so that each mean covers the same seeds."""
    runs: dict[str, dict[int, float]] = defaultdict(dict)
    for point in points:
        runs[point.seed][point.epoch] = point.CF1
    epochs = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    return [*map(float, epochs)], [float(np.mean([run[epoch] for run in runs.values()])) for epoch in epochs], None


def _by_fraction(points: Sequence[Point]) -> tuple[list[float], list[float], list[float]]:
    """Returns fractions, means and standard errors of the last epoch of each run; the error of one run is 0."""
    last: dict[float, dict[str, Point]] = defaultdict(dict)
    for point in sorted(points, key=lambda point: point.epoch):
        last[float(point.p)][point.seed] = point
    values = {p: [point.CF1 for point in last[p].values()] for p in sorted(last)}
    errors = [standard_error(v) or 0.0 for v in values.values()]
    return list(values), [float(np.mean(v)) for v in values.values()], errors


def _is_table(place: Path) -> bool:
    return place.is_file() and place.name != METRICS


def _of_run(place: Path, name: str) -> list[Point]:
    file = place / METRICS if place.is_dir() else place
    if not file.is_file():
        kind = "has no" if (place / CONFIG).is_file() else "is not the folder of a run: it has no"
        raise ConfigError(
            f"{place} {kind} {METRICS}. Use the folder of a run with the CSV logger, such as runs/cbsa/version_0, or a "
            "table_N_pseudo_labels.csv of `cbsa table`."
        )
    values = read_history(file).get(METRIC, {})
    if not values:
        raise DataError(
            f"{file} has no {METRIC}. It is measured in epochs with pseudo-labels if the true labels of the unlabeled "
            "images are known: hide some labels with data.labeled_fraction, and train beyond the warm-up."
        )
    return [Point(name, "", "", "", epoch, 100 * value) for epoch, value in sorted(values.items())]


def _of_table(file: Path) -> list[Point]:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        points = [
            Point(row["system"], row["data"], row["p"], row["seed"], int(row["epoch"]), float(row["CF1"]))
            for row in rows
        ]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} does not have the columns {', '.join(_COLUMNS)}. Use the table_N_pseudo_labels.csv of `cbsa "
            "table`."
        ) from error
    if not points:
        raise DataError(f"{file} has no rows. Run the cells of the table first: `cbsa table N`.")
    return points


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """Returns the shortest end of each path that distinguishes the runs, such as "version_0"."""
    folders = {run: Path(os.path.abspath(run if run.is_dir() else run.parent)) for run in runs}
    for depth in range(1, 1 + max((len(folder.parts) for folder in folders.values()), default=0)):
        names = {run: "/".join(folder.parts[-depth:]) for run, folder in folders.items()}
        if len(set(names.values())) == len(set(folders.values())):
            return names
    return {}
