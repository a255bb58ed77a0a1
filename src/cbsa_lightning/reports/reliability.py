"""Reliability diagram, which shows whether scores are calibrated probabilities."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from cbsa_lightning.reports.pictures import BLUE, GREY

BINS = 15
"""Number of score bins of equal width, as in the expected calibration error (``val/ECE``)."""


def reliability_diagram(scores: ArrayLike, truths: ArrayLike) -> Figure:
    """Plots the fraction of positives against the score, over all classes, and the number of entries per score.

    Args:
        scores: ``(n, C)`` in [0, 1].
        truths: ``(n, C)`` in {1, 0, -1 unknown}; unknown entries are ignored.
    """
    known = np.asarray(truths) >= 0
    score, positive = np.asarray(scores)[known], np.asarray(truths)[known] == 1
    counts, mean, rate = reliability_bins(score, positive)
    used = counts > 0
    divisor = np.maximum(counts, 1)
    error = float((counts * np.abs(mean - rate)).sum() / max(counts.sum(), 1))
    deviation = np.sqrt(rate * (1 - rate) / divisor)

    figure = Figure(figsize=(5.4, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", label="calibrated")
    above.errorbar(
        mean[used],
        rate[used],
        1.645 * deviation[used],
        color=BLUE,
        marker="o",
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label="measured, with 90 % intervals",
    )
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="fraction of positives")
    above.set_title(f"Expected calibration error {error:.3f}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # outside, it does not cover a curve
    below.bar((np.arange(BINS) + 0.5) / BINS, counts, width=0.9 / BINS, color=BLUE, alpha=0.6)
    below.set_yscale("log")
    below.set(xlabel="score", ylabel="entries")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def reliability_bins(
    score: NDArray[np.floating], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns number of entries, mean score and fraction of positives of each bin, all ``(BINS,)``; 0 if it is empty.

    Args:
        score: ``(m,)`` in [0, 1].
        positive: ``(m,)``.
    """
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    divisor = np.maximum(counts, 1)
    return counts, np.bincount(place, score, BINS) / divisor, np.bincount(place, positive, BINS) / divisor
