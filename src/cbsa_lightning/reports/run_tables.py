"""Tables of a finished run for experiment trackers: images, classes, curves and pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import precision_recall_curve

from cbsa_lightning.reports.class_heat_maps import MEASURES
from cbsa_lightning.reports.page.run_files import Validation
from cbsa_lightning.reports.page.sections import ClassRow
from cbsa_lightning.reports.precision_recall import average_precisions
from cbsa_lightning.reports.reliability import reliability_bins
from cbsa_lightning.reports.telling_images import TellingImage, evenly_spaced, score_classes, telling_images

SCORES = 100
"""Maximum number of score columns in the table of images."""
CURVES = 10
"""Maximum number of classes with a precision-recall curve."""
_POINTS = 100  # of a curve
_ROWS = 10_000  # of the table of pseudo-labels; W&B truncates longer tables


class Table(NamedTuple):
    """Columns and rows; undefined values are None."""

    columns: list[str]
    rows: list[list[Any]]


def image_table(validation: Validation, images: Sequence[TellingImage]) -> Table:
    """Creates one row per image: file, reason, labels, doubt, and one column named ``score/<class>`` per class.

    With more than :data:`SCORES` classes, only those that matter most in the images have a column; see
    :func:`~cbsa_lightning.reports.telling_images.score_classes`.
    """
    table = validation.table
    classes = score_classes(images, table.labels, validation.given, SCORES)
    columns = ["file", "why", "truth", "predicted", "doubt", *(f"score/{table.class_names[k]}" for k in classes)]
    rows = []
    for image in images:
        shown = table.labels[image.row] == 1, validation.given[image.row]
        names = (", ".join(table.class_names[k] for k in np.flatnonzero(labels)) for labels in shown)
        scores = validation.scores[image.row, classes].astype(float).round(4).tolist()
        rows.append([str(table.paths[image.row]), image.why, *names, round(image.doubt, 4), *scores])
    return Table(columns, rows)


def chosen_images(validation: Validation, count: int) -> list[TellingImage]:
    """Returns at most ``count`` telling validation images."""
    table = validation.table
    return telling_images(validation.scores, table.labels, table.class_names, count)


def class_table(rows: Sequence[ClassRow]) -> Table:
    """Creates one row per class: metrics on the validation images, their positives, and the decision threshold."""
    columns = ["class", "AP", "precision", "recall", "positives", "threshold"]
    values = [[r.AP, r.precision, r.recall, r.validation, r.threshold] for r in rows]
    return Table(columns, [[r.name, *map(_defined, found)] for r, found in zip(rows, values, strict=True)])


def precision_recall_table(validation: Validation) -> Table:
    """Creates points of the precision-recall curves of the classes with the lowest, medium and highest AP."""
    scores, truths, names = validation.scores, validation.table.labels, validation.table.class_names
    values = average_precisions(scores, truths)
    order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())]  # NaN is last
    rows = []
    for k in _lowest_medium_highest(order):
        known = truths[:, k] >= 0
        precision, recall, _ = precision_recall_curve(truths[known, k], scores[known, k], drop_intermediate=True)
        places = evenly_spaced(len(recall), _POINTS)
        name = f"{names[k]} (AP {100 * values[k]:.0f} %)"
        rows += [[name, *point] for point in zip(recall[places].tolist(), precision[places].tolist(), strict=True)]
    return Table(["class", "recall", "precision"], rows)


def reliability_table(validation: Validation) -> Table:
    """Creates the mean score and the fraction of positives of each score bin over all classes; empty bins are omitted.

    The bins are those of ``val/ECE``.
    """
    known = validation.table.labels >= 0
    counts, mean, rate = reliability_bins(validation.scores[known], validation.table.labels[known] == 1)
    points = zip(mean[counts > 0].tolist(), rate[counts > 0].tolist(), strict=True)
    return Table(["score", "fraction of positives"], [list(point) for point in points])


def pseudo_label_table(history: Mapping[int, ArrayLike], class_names: Sequence[str]) -> Table:
    """Creates one row per class and epoch with the values of :data:`~cbsa_lightning.reports.class_heat_maps.MEASURES`.

    If there are too many rows for a tracker, only every n-th epoch is listed, and the last one. Contexts are numbered
    from 1.

    Args:
        history: ``(len(MEASURES), C)`` by epoch; NaN if undefined.
        class_names: The C class names.
    """
    epochs = sorted(history, reverse=True)  # the last epoch is always listed
    listed = sorted(epochs[:: math.ceil(len(epochs) * len(class_names) / _ROWS) or 1])
    rows = []
    for epoch in listed:
        values = np.asarray(history[epoch], dtype=np.float64).copy()
        values[MEASURES.index("context")] += 1
        rows += [
            [epoch, name, *map(_defined, column)] for name, column in zip(class_names, values.T.tolist(), strict=True)
        ]
    return Table(["epoch", "class", *MEASURES], rows)


def _lowest_medium_highest(order: NDArray[np.int64]) -> list[int]:
    """Returns at most :data:`CURVES` of the classes, which are sorted by AP."""
    if len(order) <= CURVES:
        return [int(k) for k in order]
    third, middle = CURVES // 3, CURVES - 2 * (CURVES // 3)
    start = (len(order) - middle) // 2
    return [int(k) for k in [*order[:third], *order[start : start + middle], *order[-third:]]]


def _defined(value: float | None) -> float | None:
    """Returns None for values that JSON cannot represent."""
    return value if value is None or math.isfinite(value) else None
