"""Heat maps of classes and epochs: pseudo-label quality, thresholds and contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from cbsa_lightning.errors import DataError
from cbsa_lightning.reports.pictures import CONTEXT_COLOURS, DARK, GREY

MEASURES = ("precision", "recall", "coverage", "positives", "tau_pos", "tau_neg", "context")
"""Values of a class in an epoch: quality of its pseudo-labels, number of positive pseudo-labels, its thresholds
(Eq. 6), and its context."""
CLASSES = 100
"""Maximum number of classes in the heat maps."""
_TITLES = {"tau_pos": "threshold τ+", "tau_neg": "threshold τ-"}
_UNDEFINED = "#D9D9D9"
_PANEL, _ROW, _GAP = 1.75, 0.165, 0.22  # inches


def class_heat_maps(history: Mapping[int, ArrayLike], class_names: Sequence[str]) -> Figure:
    """Draws one heat map for each measure, with a row per class and a column per epoch.

    Measures without values are omitted. If all epochs have the same values, only one column is drawn. Of more than
    :data:`CLASSES` classes, those with the lowest precision of the last pseudo-labels are drawn, or those with the
    fewest positive pseudo-labels if the precision is unknown.

    Args:
        history: ``(len(MEASURES), C)`` by epoch; NaN if undefined.
        class_names: The C class names.

    Raises:
        DataError: If there is no epoch.
    """
    if not history:
        raise DataError("There are no epochs with pseudo-labels to draw.")
    epochs = sorted(history)
    values = np.stack([np.asarray(history[epoch], dtype=np.float64) for epoch in epochs], axis=2)
    constant = len(epochs) > 1 and np.array_equal(values, np.repeat(values[..., :1], len(epochs), 2), equal_nan=True)
    values = values[..., -1:] if constant else values
    rows = _chosen(values[..., -1])
    panels = [(name, values[i][rows]) for i, name in enumerate(MEASURES) if np.isfinite(values[i]).any()]

    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in (class_names[k] for k in rows)]
    left = 0.3 + 0.068 * max(map(len, names))
    head, foot, tall = 1.0, 0.95, _ROW * max(len(rows), 8)
    width = max(left + len(panels) * (_PANEL + _GAP) + 0.1, 6.2)
    height = head + tall + foot
    figure = Figure(figsize=(width, height))
    figure.text(0.15 / width, 1 - 0.32 / height, "Classes over the epochs", size=14, weight="bold", color=DARK)
    note = "Quality of the pseudo-labels, thresholds and contexts; gray: undefined"
    note += "; equal in all epochs" if constant else ""
    note += f"; the {len(rows)} worst of {len(class_names)} classes" if len(rows) < len(class_names) else ""
    figure.text(0.15 / width, 1 - 0.58 / height, note, size=9, color=GREY)
    for i, (name, matrix) in enumerate(panels):
        x = left + i * (_PANEL + _GAP)
        axes = figure.add_axes((x / width, foot / height, _PANEL / width, tall / height))
        bar = figure.add_axes(((x + 0.1) / width, 0.36 / height, (_PANEL - 0.2) / width, 0.09 / height))
        scale = _scale(name, matrix)
        image = axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap=scale.colors, norm=scale.norm)
        figure.colorbar(image, cax=bar, orientation="horizontal", ticks=scale.ticks).outline.set_visible(False)
        bar.minorticks_off()
        bar.set_xticks(scale.ticks, scale.labels)
        bar.tick_params(labelsize=7.5, length=2, color=GREY)
        axes.set_title(_TITLES.get(name, name), size=10, loc="left", pad=4)
        axes.set_yticks(range(len(rows)) if i == 0 else [], names if i == 0 else [], fontsize=8, parse_math=False)
        _epoch_ticks(axes, epochs, constant)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
    return figure


class _Scale(NamedTuple):
    colors: Colormap
    norm: Normalize
    ticks: list[float]
    labels: list[str]


def _scale(name: str, matrix: NDArray[np.float64]) -> _Scale:
    if name == "context":
        count = int(np.nanmax(matrix)) + 1
        many = [colormaps["tab20"](k % 20) for k in range(count)]
        palette = ListedColormap(CONTEXT_COLOURS[:count] if count <= len(CONTEXT_COLOURS) else many)
        groups = palette.with_extremes(bad=_UNDEFINED)
        ticks = sorted({0, (count - 1) // 2, count - 1}) if count > 8 else list(range(count))
        return _Scale(groups, Normalize(-0.5, count - 0.5), list(map(float, ticks)), [str(k + 1) for k in ticks])
    colors = colormaps["viridis"].with_extremes(bad=_UNDEFINED)
    highest = float(matrix[np.isfinite(matrix)].max())
    if name != "positives":
        top = highest if name in _TITLES and highest > 0 else 1.0  # thresholds can be close to 0
        return _Scale(colors, Normalize(0, top), [0, top / 2, top], ["0", f"{top / 2:.2g}", f"{top:.2g}"])
    highest = max(highest, 10.0)
    powers = [10.0**k for k in range(int(math.log10(highest)) + 1)]
    shown = powers[:: math.ceil(len(powers) / 4)]
    # A class without positive pseudo-labels gets the darkest color.
    norm = LogNorm(1, highest, clip=True)
    return _Scale(colors, norm, shown, [f"{k / 1000:g}k" if k >= 1000 else f"{k:g}" for k in shown])


def _chosen(last: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the rows of the classes to draw, in their order."""
    classes = last.shape[1]
    if classes <= CLASSES:
        return np.arange(classes)
    precision = last[MEASURES.index("precision")]
    order = precision if np.isfinite(precision).any() else last[MEASURES.index("positives")]
    return np.sort(np.argsort(order, kind="stable")[:CLASSES])  # NaN is last


def _epoch_ticks(axes: Axes, epochs: Sequence[int], constant: bool) -> None:
    if constant:
        axes.set_xticks([0], ["all epochs"], fontsize=8)
        return
    every = math.ceil(len(epochs) / 5)
    places = range(0, len(epochs), every)
    axes.set_xticks(places, [str(epochs[i]) for i in places], fontsize=8)
    axes.set_xlabel("epoch", fontsize=8, labelpad=1)
