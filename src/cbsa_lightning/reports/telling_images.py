"""Selects images to show: evenly spaced ones, or the wrong, uncertain and possibly mislabeled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbsa_lightning.inference.labels.image_labels import doubt_of

WORST, DOUBTFUL, SUSPECTED = "worst", "most doubtful", "suspected label error"
_AT_LEAST = 0.5  # probability of the opposite label


class TellingImage(NamedTuple):
    """A selected image: its row, the reasons, and its doubt, which is the sum of the classes' binary entropies."""

    row: int
    why: str
    doubt: float


def evenly_spaced(total: int, most: int) -> NDArray[np.int64]:
    """Returns at most ``most`` evenly spaced positions below ``total``."""
    return np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))


def telling_images(scores: ArrayLike, truths: ArrayLike, class_names: Sequence[str], count: int) -> list[TellingImage]:
    """Selects images for three reasons, up to a third of ``count`` images for each reason.

    - "worst": the highest mean cross-entropy over the known labels;
    - "most doubtful": the highest sum of binary entropies over the classes;
    - "suspected label error": the highest score against a known label, at least 0.5. The reason names the class.

    An image that is selected for several reasons occurs once.

    Args:
        scores: ``(n, C)`` in [0, 1]; calibrated probabilities find more label errors.
        truths: ``(n, C)`` in {1, 0, -1 unknown}.
        class_names: The C class names.
        count: Maximum number of images, at least 3.

    Returns:
        The worst images first, then the other doubtful ones, then the others.
    """
    scores, truths = np.asarray(scores, dtype=np.float64), np.asarray(truths)
    known = truths >= 0
    wrong = np.where(known, np.abs(scores - (truths == 1)), 0.0)  # score against the label
    loss = -np.log(np.maximum(1 - wrong, 1e-12)).sum(1) / np.maximum(known.sum(1), 1)
    doubt = doubt_of(scores)
    most = wrong.max(1)
    why: dict[int, list[str]] = {}
    for reason, values, lowest in ((WORST, loss, 0.0), (DOUBTFUL, doubt, 0.0), (SUSPECTED, most, _AT_LEAST)):
        for row in _first(values, count // 3, lowest):
            name = f" ({class_names[int(wrong[row].argmax())]})" if reason == SUSPECTED else ""
            why.setdefault(row, []).append(reason + name)
    return [TellingImage(row, ", ".join(reasons), float(doubt[row])) for row, reasons in why.items()]


def _first(values: NDArray[np.float64], count: int, lowest: float) -> list[int]:
    """Returns the rows of the highest values above ``lowest``, or equal to a positive ``lowest``."""
    order = np.argsort(-values, kind="stable")[:count]
    rows: list[int] = order[(values[order] >= lowest) & (values[order] > 0)].tolist()
    return rows


def score_classes(
    images: Sequence[TellingImage], truths: NDArray[np.int8], given: NDArray[np.bool_], most: int
) -> list[int]:
    """Returns the classes to include in a table of the images' scores.

    These are all classes, or those that matter most for the images if there are more than ``most`` classes.

    A class matters in an image that shows it or for which it is predicted.

    Args:
        images: The images.
        truths: ``(n, C)`` in {1, 0, -1 unknown}.
        given: ``(n, C)``, predicted labels.
        most: Maximum number of classes.
    """
    classes = truths.shape[1]
    if classes <= most:
        return list(range(classes))
    rows = [image.row for image in images]
    counts = ((truths[rows] == 1) | given[rows]).sum(0)
    order = np.argsort(-counts, kind="stable")[:most]
    return sorted(int(k) for k in order if counts[k] > 0)
