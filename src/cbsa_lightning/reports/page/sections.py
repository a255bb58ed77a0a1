"""Creates the content of the page's sections: the rows of the table of classes, and images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.inference.predictions import SEPARATOR
from cbsa_lightning.reports.page.run_files import Listing, Unlabeled, Validation
from cbsa_lightning.reports.page.thumbnails import thumbnail
from cbsa_lightning.reports.precision_recall import average_precisions

CLASSES = 30  # maximum number of classes with images
EXAMPLES = 4  # maximum number of images per kind of example
LISTED = 24  # maximum number of images per list
CONTEXTS = 12
_NAMES = 12  # maximum number of labels in a caption


class ClassRow(NamedTuple):
    """A row of the table of classes. A metric is NaN if it is undefined, and None if it was not measured."""

    name: str
    labeled: int
    validation: int | None
    AP: float | None
    threshold: float
    precision: float | None
    recall: float | None
    F1: float | None
    given: int | None


class Shown(NamedTuple):
    """An image of the page. ``uri`` is None if the image cannot be read."""

    uri: str | None
    path: str
    lines: list[str]


class ClassExamples(NamedTuple):
    """Images of a class by kind of example; kinds without images are omitted."""

    row: ClassRow
    kinds: list[tuple[str, list[Shown]]]


class Context(NamedTuple):
    """Classes that often occur together, with images that show many of them."""

    classes: list[str]
    images: list[Shown]


def class_rows(
    class_names: Sequence[str],
    labeled: NDArray[np.int64],
    thresholds: NDArray[np.float32],
    validation: Validation | None,
) -> list[ClassRow]:
    """Creates one row per class, without the counts of unlabeled images."""
    columns: list[list[float | None]] = [[None] * len(class_names) for _ in range(5)]
    if validation is not None:
        truth, given = validation.table.labels, validation.given
        hits = (given & (truth == 1)).sum(0)
        positives = (truth == 1).sum(0)
        precision = _ratio(hits, (given & (truth >= 0)).sum(0))
        recall = _ratio(hits, positives)
        F1 = _ratio(2 * hits, (given & (truth >= 0)).sum(0) + positives)
        AP = average_precisions(validation.scores, truth)
        # Without positives, precision and F1 count as undefined.
        precision, F1 = (np.where(positives > 0, figure, np.nan) for figure in (precision, F1))
        columns = [column.tolist() for column in (positives, AP, precision, recall, F1)]
    return [
        ClassRow(name, int(count), None if n is None else int(n), ap, float(cut), p, r, f, None)
        for name, count, cut, n, ap, p, r, f in zip(class_names, labeled, thresholds, *columns, strict=True)
    ]


def chosen_classes(rows: Sequence[ClassRow]) -> list[int]:
    """Returns the classes to show with images.

    Classes with the lowest AP come first. They are followed by classes without AP, in the order of their number of
    labeled images.
    """
    AP = np.array([np.nan if row.AP is None else row.AP for row in rows])
    order: list[int] = np.lexsort((np.array([row.labeled for row in rows]), AP)).tolist()
    return order[:CLASSES]


def class_examples(
    k: int, row: ClassRow, validation: Validation | None, unlabeled: Unlabeled | None, root: Path
) -> ClassExamples:
    """Selects the worst, the most uncertain and the most typical images of class ``k``.

    The worst images are validation images. The other images are unlabeled images, or validation images if there are no
    unlabeled images.

    Args:
        k: Index of the class.
        row: Row of the class.
        validation: The validation images.
        unlabeled: The unlabeled images, with the scores of class ``k``.
        root: Folder of the unlabeled images.
    """
    kinds = []
    if validation is not None:
        truth, scores = validation.table.labels[:, k], validation.scores[:, k]
        wrong = (truth >= 0) & (validation.given[:, k] != (truth == 1))
        error = np.where(wrong, np.abs(scores - (truth == 1)), -1.0)
        kinds.append(("Largest errors", [_judged(i, k, validation) for i in _first(-error, int(wrong.sum()))]))
    if unlabeled is not None:
        scores = unlabeled.scores[k]
    else:
        scores = np.empty(0, np.float32) if validation is None else validation.scores[:, k]
    cut = min(row.threshold, 1.0)  # the threshold is infinite if no image gets the class
    for title, order in (("Least certain", np.abs(scores - cut)), ("Most typical", -scores)):
        places = _first(order, len(scores))
        if unlabeled is not None:
            kinds.append((title, [_proposed(i, k, unlabeled, root) for i in places]))
        elif validation is not None:
            kinds.append((title, [_judged(i, k, validation) for i in places]))
    return ClassExamples(row, [(title, images) for title, images in kinds if images])


def next_images(listing: Listing, root: Path) -> list[Shown]:
    """Returns the images to label next."""
    return [
        _shown(
            root / row["image"], row["image"], f"model: {_joined(row['labels'])}", f"unsure: {_joined(row['classes'])}"
        )
        for row in listing.rows
    ]


def suspicious_images(listing: Listing, root: Path) -> list[Shown]:
    """Returns the given labels that may be wrong."""
    return [
        _shown(
            root / row["image"],
            row["image"],
            f"{'labeled' if row['given'] == 'yes' else 'labeled without'} {row['class']}",
            f"may be wrong ({100 * float(row['wrong']):.0f} %)",
        )
        for row in listing.rows
    ]


def context_sections(
    partition: NDArray[np.int64], class_names: Sequence[str], validation: Validation | None
) -> list[Context]:
    """Returns the contexts from the largest to the smallest.

    Each has its classes and the validation images that show most of these classes.
    """
    groups = sorted((np.flatnonzero(partition == k) for k in np.unique(partition)), key=len, reverse=True)
    found = []
    for members in groups[:CONTEXTS]:
        images = []
        if validation is not None:
            order = -validation.scores[:, members].mean(1)
            images = [_pictured(i, validation) for i in _first(order, len(order))]
        found.append(Context([class_names[k] for k in members.tolist()], images))
    return found


def _first(order: NDArray[np.floating], count: int) -> list[int]:
    """Returns the indices of the ``count`` smallest values."""
    places: list[int] = np.argsort(order, kind="stable")[: min(EXAMPLES, count)].tolist()
    return places


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _judged(i: int, k: int, validation: Validation) -> Shown:
    table = validation.table
    truth = {1: "labeled", 0: "labeled without"}.get(int(table.labels[i, k]), "not labeled for")
    score = f"score {100 * validation.scores[i, k]:.0f} %, {truth} {table.class_names[k]}"
    return _shown(table.file(i), str(table.paths[i]), score, f"labels: {_labels(i, table)}")


def _pictured(i: int, validation: Validation) -> Shown:
    table = validation.table
    return _shown(table.file(i), str(table.paths[i]), f"labels: {_labels(i, table)}")


def _proposed(i: int, k: int, unlabeled: Unlabeled, root: Path) -> Shown:
    path = unlabeled.images[i].as_py()
    score = f"score {100 * unlabeled.scores[k][i]:.0f} %"
    return _shown(root / path, path, score, f"model: {_joined(unlabeled.labels[i].as_py())}")


def _labels(i: int, table: AnnotationTable) -> str:
    return _joined(SEPARATOR.join(table.class_names[k] for k in np.flatnonzero(table.labels[i] == 1)))


def _joined(labels: str) -> str:
    names = labels.split(SEPARATOR)
    rest = [f"{len(names) - _NAMES} more"] if len(names) > _NAMES else []
    return ", ".join(names[:_NAMES] + rest) or "none"


def _shown(file: Path, path: str, *lines: str) -> Shown:
    return Shown(thumbnail(file), path, list(lines))
