"""Precision-recall curves of the mean over all classes and of the classes with the lowest average precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve

from cbsa_lightning.reports.pictures import CONTEXT_COLOURS, DARK

LOWEST = 5
"""Number of classes in the plot in addition to the mean."""
_GRID = np.linspace(0, 1, 101)
_COLOURS = CONTEXT_COLOURS[:LOWEST]


def average_precisions(scores: ArrayLike, truths: ArrayLike) -> NDArray[np.float64]:
    """Computes the average precision ``(C,)`` of each class over its known entries; NaN without positives.

    Args:
        scores: ``(n, C)``.
        truths: ``(n, C)`` in {1, 0, -1 unknown}.
    """
    scores, truths = np.asarray(scores), np.asarray(truths)
    found = np.full(scores.shape[1], np.nan)
    for k in np.flatnonzero((truths == 1).any(0)):
        known = truths[:, k] >= 0
        found[k] = average_precision_score(truths[known, k], scores[known, k])
    return found


def precision_recall_curves(scores: ArrayLike, truths: ArrayLike, class_names: Sequence[str]) -> Figure:
    """Plots precision against recall over all thresholds.

    The mean curve averages, over the classes, the best precision at the same or a higher recall.

    Args:
        scores: ``(n, C)`` in [0, 1].
        truths: ``(n, C)`` in {1, 0, -1 unknown}.
        class_names: The C class names.
    """
    scores, truths = np.asarray(scores), np.asarray(truths)
    values = average_precisions(scores, truths)
    lowest = np.argsort(values, kind="stable")[: min(LOWEST, int((~np.isnan(values)).sum()))]  # NaN is sorted last
    figure = Figure(figsize=(5.4, 6.4), layout="constrained")
    axes = figure.subplots()
    total, shown = np.zeros_like(_GRID), {}
    for k in np.flatnonzero(~np.isnan(values)):
        known = truths[:, k] >= 0
        precision, recall, _ = precision_recall_curve(truths[known, k], scores[known, k])
        best = np.maximum.accumulate(precision)  # recall decreases along the arrays
        total += best[::-1][np.searchsorted(recall[::-1], _GRID)]
        if k in lowest:
            shown[int(k)] = (recall, precision)
    for k, color in zip(lowest.tolist(), _COLOURS, strict=False):
        name = class_names[k] if len(class_names[k]) <= 30 else f"{class_names[k][:29]}…"
        # The name comes last, since matplotlib hides labels with a leading underscore.
        label = f"AP {100 * values[k]:.0f} %: {name}"
        axes.step(*shown[k], where="post", color=color, linewidth=1, label=label)
    if len(lowest):
        mean = f"mAP {100 * np.nanmean(values):.0f} %: mean of {int((~np.isnan(values)).sum())} classes"
        axes.plot(_GRID, total / (~np.isnan(values)).sum(), color=DARK, linewidth=2.5, label=mean)
        legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Mean, and the classes with the lowest AP" if len(values) > LOWEST else "Mean, and each class")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
