"""Lists of images to label next and of given labels to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from cbsa_lightning.inference.labels.image_labels import ImageLabels, doubt_of
from cbsa_lightning.inference.predictions import SEPARATOR
from cbsa_lightning.io.files import replacing

SHOWN = 5  # maximum number of classes in a row of a list


def next_to_label(labels: ImageLabels, budget: int, positives: NDArray[np.integer] | None = None) -> pa.Table:
    """Lists the images whose labels would be most useful, starting with the most uncertain image.

    The columns are ``image``, ``doubt`` (the sum of the binary entropies of all classes, in bits), ``classes`` (the
    most uncertain classes) and ``labels`` (the predicted classes).

    Args:
        labels: Labels of the unlabeled images.
        budget: Maximum number of images in the list.
        positives: ``(C,)``, number of labeled positives of each class. If it is given, the entropy of a class is
            divided by the square root of this number plus one, so that rare classes get more weight. Otherwise, all
            classes have equal weight.
    """
    weights = None if positives is None else (positives + 1.0) ** -0.5
    doubt = doubt_of(labels.probabilities, weights)
    rows = np.argsort(-doubt, kind="stable")[:budget]
    each = np.abs(labels.probabilities[rows] - 0.5)
    order = np.argsort(each, axis=1)[:, :SHOWN]
    given = labels.names(labels.given[rows])
    return pa.table(
        {
            "image": pa.array(labels.images[rows].tolist(), pa.string()),
            "doubt": pa.array(doubt[rows].round(4)),
            "classes": pa.array([SEPARATOR.join(labels.class_names[k] for k in row) for row in order], pa.string()),
            "labels": pa.array([SEPARATOR.join(names) for names in given], pa.string()),
        }
    )


def suspicious_labels(
    images: NDArray[Any],
    class_names: tuple[str, ...],
    labels: NDArray[np.int8],
    left_out: NDArray[np.floating],
    at_least: float = 0.5,
) -> pa.Table:
    """Lists given labels that out-of-fold probabilities contradict, starting with the least probable label.

    The columns are ``image``, ``class``, ``given`` ("yes" or "no") and ``wrong``, the probability that the label is
    wrong.

    Args:
        images: ``(m,)``, paths of the labeled images.
        class_names: The C class names.
        labels: ``(m, C)`` in {1, 0, -1}; unknown entries are ignored.
        left_out: ``(m, C)``, out-of-fold probabilities.
        at_least: Minimum probability of being wrong for a label to be listed.
    """
    wrong = np.where(labels == 1, 1 - left_out, np.where(labels == 0, left_out, 0.0))
    rows, classes = np.nonzero(wrong >= at_least)
    order = np.argsort(-wrong[rows, classes], kind="stable")
    rows, classes = rows[order], classes[order]
    return pa.table(
        {
            "image": pa.array(images[rows].tolist(), pa.string()),
            "class": pa.array([class_names[k] for k in classes], pa.string()),
            "given": pa.array(["yes" if labels[i, k] == 1 else "no" for i, k in zip(rows, classes, strict=True)]),
            "wrong": pa.array(wrong[rows, classes].round(4)),
        }
    )


def write_list(path: Path, table: pa.Table) -> None:
    """Writes a list as CSV; the file is written atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    with replacing(path) as draft:
        pyarrow.csv.write_csv(table, str(draft))
