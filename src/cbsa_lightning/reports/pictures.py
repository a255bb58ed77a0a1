"""Plots of a run as matplotlib figures: predictions, attention, contexts, curves, and metrics of each class.

They do not need a display. Correct and wrong labels differ by a sign as well as by color; the colors are those of Okabe
and Ito, which color-blind people can distinguish.
"""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cbsa_lightning.errors import DataError

BLUE, GREEN, ORANGE, GREY, DARK = "#0072B2", "#009E73", "#D55E00", "#707070", "#222222"
CONTEXT_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#B07800", "#3A9BD0", "#5D3A9B", DARK)

History = Mapping[str, Mapping[int, float]]
"""Values of each metric, by epoch."""


class _Mark(NamedTuple):
    """A label of an image as it is displayed."""

    text: str
    color: str


def prediction_gallery(
    images: Tensor,
    truths: ArrayLike,
    scores: ArrayLike,
    thresholds: ArrayLike,
    class_names: Sequence[str],
    columns: int = 4,
    max_labels: int = 6,
) -> Figure:
    """Draws images with their predicted and missed labels underneath.

    Args:
        images: ``(n, 3, S, S)`` uint8.
        truths: ``(n, C)`` in {1, 0, -1 unknown}.
        scores: ``(n, C)`` in [0, 1].
        thresholds: ``(C,)``, decision threshold of each class.
        class_names: The C class names.
        columns: Number of images per row.
        max_labels: Maximum number of lines under an image. If there are more labels, only their number is shown.

    Raises:
        DataError: If there are no images.
    """
    truths, scores, thresholds = np.asarray(truths), np.asarray(scores), np.asarray(thresholds)
    pictures = _as_arrays(images)
    marks = []
    for row in range(len(pictures)):
        found = _marks(scores[row], truths[row], thresholds, class_names)
        if len(found) > max_labels:
            rest = len(found) - max_labels + 1
            found = [*found[: max_labels - 1], _Mark(f"… and {rest} more", GREY)]
        marks.append(found or [_Mark("no label, none predicted", GREY)])
    columns = min(columns, len(pictures))
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    side, gap, line, head = 2.2, 0.3, 0.18, 0.85
    heights = [side + 0.12 + line * max(len(marks[i]) for i in row) + gap for row in rows]
    width, height = max(columns * (side + gap) + gap, 5.6), head + sum(heights)
    figure = Figure(figsize=(width, height))
    _heading(figure, "Predicted labels", height)
    key = [_Mark("✓ right", GREEN), _Mark("✗ wrong", ORANGE), _Mark("○ missed", GREY)]
    if (truths < 0).any():
        key.append(_Mark("? truth unknown", BLUE))
    for position, mark in enumerate(key):
        figure.text((gap + 1.2 * position) / width, 1 - 0.6 / height, mark.text, color=mark.color, size=9)
    left = (width - columns * (side + gap) + gap) / 2
    top = height - head
    for members, tall in zip(rows, heights, strict=True):
        for column, i in enumerate(members):
            x = left + column * (side + gap)
            axes = figure.add_axes((x / width, (top - side) / height, side / width, side / height))
            show_image(axes, pictures[i])
            for number, mark in enumerate(marks[i]):
                y = top - side - 0.12 - line * number
                _text(figure, x / width, y / height, mark, va="top", size=9)
        top -= tall
    return figure


def attention_gallery(
    images: Tensor,
    maps: ArrayLike,
    truths: ArrayLike,
    scores: ArrayLike,
    thresholds: ArrayLike,
    class_names: Sequence[str],
    max_labels: int = 4,
) -> Figure:
    """Draws the attention map of each predicted label, with one image per row and one label per column.

    If an image has no predicted label, the map of the class with the highest score is drawn.

    Args:
        images: ``(n, 3, S, S)`` uint8.
        maps: ``(n, C, h, w)``, non-negative. The color scale ranges from the mean to the maximum of a map.
        truths: ``(n, C)`` in {1, 0, -1 unknown}.
        scores: ``(n, C)`` in [0, 1].
        thresholds: ``(C,)``, decision threshold of each class.
        class_names: The C class names.
        max_labels: Maximum number of labels per image; those with the highest scores are shown.

    Raises:
        DataError: If there are no images.
    """
    truths, scores, thresholds = np.asarray(truths), np.asarray(scores), np.asarray(thresholds)
    maps, pictures = np.asarray(maps, dtype=np.float32), _as_arrays(images)
    chosen = []
    for row in scores:
        order = np.argsort(-row, kind="stable")
        given = [k for k in order.tolist() if row[k] >= thresholds[k]][:max_labels]
        chosen.append(given or [int(order[0])])
    columns = 1 + max(len(classes) for classes in chosen)
    side, gap, title, head = 1.9, 0.15, 0.28, 0.85
    width = max(columns * (side + gap) + 0.6 - gap, 5.6)
    height = head + len(pictures) * (side + title + gap)
    figure = Figure(figsize=(width, height))
    _heading(figure, "Attention of each label", height)
    note = "✓ right  ✗ wrong  ? truth unknown  ○ below its threshold; bright: high attention"
    figure.text(0.3 / width, 1 - 0.6 / height, note, color=GREY, size=9)
    for i, classes in enumerate(chosen):
        bottom = height - head - (i + 1) * (side + title + gap) + gap
        for column, k in enumerate([None, *classes]):
            place = ((0.3 + column * (side + gap)) / width, bottom / height, side / width, side / height)
            axes = figure.add_axes(place)
            if k is None:
                show_image(axes, pictures[i])
                continue
            show_image(axes, pictures[i], maps[i, k])
            mark = _mark(class_names[k], scores[i, k], truths[i, k], scores[i, k] >= thresholds[k], 20)
            axes.set_title(mark.text, color=mark.color, size=9, pad=4, parse_math=False)
    return figure


def context_map(S: ArrayLike, partition: ArrayLike, class_names: Sequence[str]) -> Figure:
    """Draws the co-occurrence matrix with classes sorted by context, frames around the contexts, and their classes.

    Args:
        S: ``(C, C)``; row k contains the fractions of the images with class k that also show the column's class. The
            diagonal is ignored.
        partition: ``(C,)``, context of each class.
        class_names: The C class names.
    """
    matrix, groups = np.asarray(S).astype(np.float64), np.asarray(partition)  # copied, since it is modified
    np.fill_diagonal(matrix, np.nan)
    mutual = np.nansum(matrix + matrix.T, axis=1)
    order = np.lexsort((-mutual, groups))
    ids = sorted(set(groups.tolist()))
    color = {k: CONTEXT_COLOURS[i % len(CONTEXT_COLOURS)] for i, k in enumerate(ids)}
    classes = len(order)
    cell = float(np.clip(6.5 / classes, min(0.15, 14 / classes), 0.5))
    named = cell >= 0.11  # in smaller cells, names would be illegible
    size, font = cell * classes, min(cell * 72 * 0.72, 9.0)
    longest = max(len(_short(name, 20)) for name in class_names)
    margin = 0.25 + (longest * font * 0.0088 if named else 0.0)
    panel, head = 4.1, 0.85
    entries = [(k, [class_names[j] for j in order if groups[j] == k]) for k in ids]
    listing = [(k, textwrap.wrap(", ".join(names), 54)) for k, names in entries]
    needed = sum(0.32 + 0.17 * len(lines) + 0.1 for _, lines in listing)
    width, height = margin + size + 0.45 + panel, head + max(size + margin, needed + 1.0) + 0.15
    figure = Figure(figsize=(width, height))
    _heading(figure, f"{len(ids)} contexts of {classes} classes", height)
    subtitle = "Fraction of the images with the row's class that also show the column's class"
    figure.text(0.3 / width, 1 - 0.6 / height, subtitle, color=GREY, size=9)
    axes = figure.add_axes((margin / width, 1 - (head + size) / height, size / width, size / height))
    cmap = colormaps["Greys"].with_extremes(bad="#FFFFFF")
    limit = float(np.nanmax(matrix, initial=0.0)) or 1.0
    shown = axes.imshow(matrix[np.ix_(order, order)], cmap=cmap, vmin=0, vmax=limit)
    start = 0
    for k, names in entries:
        frame = Rectangle((start - 0.5, start - 0.5), len(names), len(names))
        frame.set(fill=False, edgecolor=color[k], linewidth=2.5, clip_on=False, zorder=3)
        axes.add_patch(frame)
        start += len(names)
    ticks = range(classes) if named else []
    texts = [_short(class_names[j], 20) for j in order] if named else []
    axes.set_xticks(ticks, texts, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(ticks, texts, fontsize=font, parse_math=False)
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, j in zip(axis, order, strict=False):
            label.set_color(color[groups[j]])
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)

    x, y = margin + size + 0.45, height - head
    bar = figure.add_axes((x / width, (y - 0.14) / height, 2.2 / width, 0.14 / height))
    figure.colorbar(shown, cax=bar, orientation="horizontal", format="{x:.0%}").outline.set_visible(False)
    bar.tick_params(labelsize=8, length=2)
    bar.xaxis.set_major_locator(MaxNLocator(4))
    y -= 0.75
    for number, (k, lines) in enumerate(listing, start=1):
        count = len(entries[number - 1][1])
        title = f"Context {number} ({count} class{'es' if count > 1 else ''})"
        figure.text(x / width, y / height, title, color=color[k], size=10, weight="bold", va="top")
        body = "\n".join(lines)
        figure.text(x / width, (y - 0.22) / height, body, color=DARK, size=8.5, va="top", parse_math=False)
        y -= 0.32 + 0.17 * len(lines) + 0.1
    return figure


class _Curve(NamedTuple):
    metric: str
    name: str
    color: str
    style: str


_PANELS: tuple[tuple[str, bool, tuple[_Curve, ...]], ...] = (
    (
        "Validation mAP, %",
        True,
        (
            _Curve("val/mAP", "averaged weights", BLUE, "o-"),
            _Curve("val/mAP_raw", "raw weights", ORANGE, "s--"),
        ),
    ),
    (
        "mAP over one feature for all labels, points",
        True,
        (_Curve("val/specific_gain", "gain from label-specific features", BLUE, "o-"),),
    ),
    (
        "Pseudo-labels, %",
        True,
        (
            _Curve("pseudo/precision", "precision", BLUE, "o-"),
            _Curve("pseudo/recall", "recall", ORANGE, "s--"),
            _Curve("pseudo/coverage", "coverage", GREY, "^:"),
        ),
    ),
    (
        "Training loss",
        False,
        (
            _Curve("train/loss_sup", "labeled images", BLUE, "o-"),
            _Curve("train/loss_unsup", "pseudo-labeled images", ORANGE, "s--"),
            _Curve("train/loss_aux", "contexts", GREEN, "^:"),
        ),
    ),
)


def training_curves(history: History | str | os.PathLike[str], warmup_epochs: int = 0) -> Figure:
    """Plots validation mAP, the gain from label-specific features, pseudo-label quality and losses over the epochs.

    Panels without values are omitted.

    Args:
        history: Values by metric and epoch, or the ``metrics.csv`` of a Lightning ``CSVLogger``.
        warmup_epochs: First epoch with unlabeled images, which is marked if it is within the run.

    Raises:
        DataError: If the history contains none of the metrics.
    """
    values = read_history(history) if isinstance(history, (str, os.PathLike)) else history
    panels = [panel for panel in _PANELS if any(values.get(curve.metric) for curve in panel[2])]
    if not panels:
        raise DataError("The history contains no curve to plot: it has no val/mAP, pseudo/... or train/loss_... value.")
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    figure.suptitle("Training", x=0.01, ha="left", size=14, weight="bold")
    for axes, (title, percent, curves) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for metric, name, color, style in curves:
            points = sorted(values.get(metric, {}).items())
            if metric == "train/loss_unsup":  # it is 0 in the warm-up, which has no unlabeled images
                points = [(epoch, value) for epoch, value in points if epoch >= warmup_epochs]
            if not points:
                continue
            heights = [100 * value if percent else value for _, value in points]
            every = max(1, len(points) // 20)
            axes.plot([e for e, _ in points], heights, style, color=color, label=name, ms=4, markevery=every)
        axes.set_title(title, size=11, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        epochs = [epoch for curve in curves for epoch in values.get(curve.metric, {})]
        if min(epochs) < warmup_epochs <= max(epochs):
            axes.axvline(warmup_epochs, color=GREY, lw=1, ls=(0, (2, 3)), label="start of unlabeled images")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=8, frameon=False)
        _plain(axes)
        axes.grid(axis="y", color="#E4E4E4", lw=0.8)
    return figure


def read_history(file: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Reads the last value of each metric in each epoch from the ``metrics.csv`` of a Lightning ``CSVLogger``.

    Raises:
        DataError: If the file is missing or has no epochs.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    if not rows or "epoch" not in rows[0]:
        raise DataError(f"{file} has no column named 'epoch'; use the metrics.csv of a CSVLogger.")
    history: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, text in row.items():
            if text and row["epoch"] and name not in ("epoch", "step"):
                history.setdefault(name, {})[int(row["epoch"])] = float(text)
    return history


def per_class_bars(AP: ArrayLike, class_names: Sequence[str], column: int = 40) -> Figure:
    """Plots the average precision of every class in descending order; classes without a positive image come last.

    Args:
        AP: ``(C,)`` in [0, 1]; NaN if undefined.
        class_names: The C class names.
        column: Maximum number of bars per column. If there are more classes, there are several columns.
    """
    values = 100 * np.asarray(AP, dtype=np.float64)
    order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
    number = math.ceil(len(order) / column)
    tall = math.ceil(len(order) / number)
    figure = Figure(figsize=(max(5.2, 4.4 * number), 1.5 + 0.2 * tall), layout="constrained")
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else math.nan
    title = f"Average precision by class, %   (mean {mean:.1f})" if len(known) else "Average precision by class"
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    for axes, start in zip(np.ravel(figure.subplots(1, number)), range(0, len(order), tall), strict=True):
        some = order[start : start + tall]
        lengths = np.nan_to_num(values[some])
        axes.barh(range(len(some)), lengths, color=BLUE, height=0.72)
        for y, k in enumerate(some):
            missing = np.isnan(values[k])
            text = "no positive image" if missing else f"{values[k]:.1f}"
            color = GREY if missing else DARK
            label = axes.text(lengths[y] + 1.2, y, text, va="center", size=8, color=color)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # it covers the line of the mean
        axes.set_yticks(range(len(some)), [_short(class_names[k], 24) for k in some], fontsize=8.5, parse_math=False)
        axes.set(xlim=(0, 112), ylim=(tall - 0.4, -0.6), xticks=[0, 25, 50, 75, 100])
        if len(known):
            axes.axvline(mean, color=ORANGE, lw=1.2, ls="--", zorder=0)
        axes.tick_params(axis="y", length=0)
        _plain(axes)
    return figure


# Parts -----------------------------------------------------------------------------------------------------------


def _marks(
    scores: NDArray[Any], truths: NDArray[Any], thresholds: NDArray[Any], class_names: Sequence[str]
) -> list[_Mark]:
    """Returns the predicted labels in descending order of their scores, followed by missed labels."""
    given = scores >= thresholds
    order = np.argsort(-scores, kind="stable")
    shown = [k for k in order if given[k]] + [k for k in order if truths[k] == 1 and not given[k]]
    return [_mark(class_names[k], scores[k], truths[k], given[k], 24) for k in shown]


def _mark(name: str, score: float, truth: int, given: bool, limit: int) -> _Mark:
    if not given:
        sign, color = "○", GREY
    else:
        sign, color = {1: ("✓", GREEN), 0: ("✗", ORANGE), -1: ("?", BLUE)}[int(truth)]
    return _Mark(f"{sign} {_short(name, limit)} {score:.2f}", color)


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _as_arrays(images: Tensor) -> NDArray[np.uint8]:
    """Converts views ``(n, 3, S, S)`` to images ``(n, S, S, 3)``."""
    if not len(images):
        raise DataError("There are no images to show.")
    return images.permute(0, 2, 3, 1).cpu().numpy()


def show_image(axes: Axes, image: NDArray[np.uint8], heat: NDArray[np.float32] | None = None) -> None:
    """Shows an image ``(S, S, 3)``, or its gray version with a map ``(h, w)`` in color."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    if heat is None:
        axes.imshow(image, extent=extent, interpolation="bilinear")
    else:
        gray = image.astype(np.float32).mean(axis=2)
        axes.imshow(gray, cmap="gray", vmin=-60, vmax=255, extent=extent, interpolation="bilinear")
        # The strength is relative to uniform attention, so that a map without a clear peak is drawn faintly instead of
        # being scaled to full strength.
        excess = np.maximum(heat / max(float(heat.mean()), 1e-12) - 1, 0)
        strength = excess / max(float(excess.max()), 2.0)
        layer = colormaps["inferno"](0.25 + 0.75 * strength)
        layer[..., 3] = 0.85 * np.sqrt(strength)  # pixels without attention are not changed
        axes.imshow(layer, extent=extent, interpolation="bilinear")
    axes.set_axis_off()


def _text(figure: Figure, x: float, y: float, mark: _Mark, **options: Any) -> None:
    figure.text(x, y, mark.text, color=mark.color, parse_math=False, **options)


def _heading(figure: Figure, text: str, height: float) -> None:
    width = figure.get_size_inches()[0]
    figure.text(0.3 / width, 1 - 0.35 / height, text, size=14, weight="bold", color=DARK)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
