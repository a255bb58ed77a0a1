"""Merging of several rows for the same image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import UNKNOWN, StringArray, repeated_rows
from cbsa_lightning.data.readers.columns import Columns
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

Repeated = Literal["stop", "unknown", "union"]
_SHARE = 0.1  # fraction of images with several labels, below which repeated rows are considered mistakes
CHOICES: tuple[Repeated, ...] = ("stop", "unknown", "union")


class Merged(NamedTuple):
    """A table after merging.

    Attributes:
        kept: (m,) the first row of each image.
        labels: (m, C) int8, the labels of the images.
        note: A note on the merged rows, or empty if there was one row per image.
    """

    kept: NDArray[np.int64]
    labels: NDArray[np.int8]
    note: str


def merge_rows(
    columns: Columns,
    paths: StringArray,
    labels: NDArray[np.int8],
    class_names: Sequence[str],
    how: Repeated,
    one_label_a_row: bool,
) -> Merged:
    """Merges all rows of an image into one. A label is known if it is known in any of the rows.

    Args:
        columns: The table, for error messages.
        paths: (n,) the image of each row.
        labels: (n, C) int8, the labels of each row.
        class_names: The C class names.
        how: Label of a class that is present in one row and absent in another. "unknown" means -1, and "union" means
            present. "stop" raises an error, unless the table clearly has one row per label: at least a tenth of the
            images have several rows, and each of these rows contains one class, which is not repeated.
        one_label_a_row: Whether each row has at most one label and there is no column for annotators.

    Raises:
        DataError: If rows contradict each other and ``how`` is "stop".
    """
    pairs = repeated_rows(paths)
    first = np.arange(len(paths))  # for each row, the first row of its image
    if not pairs:
        return Merged(first, labels, "")
    firsts, laters = np.array(pairs).T
    first[laters] = firsts
    order = np.argsort(first, kind="stable")
    kept, starts = np.unique(first[order], return_index=True)
    present = np.logical_or.reduceat(labels[order] == 1, starts)
    absent = np.logical_or.reduceat(labels[order] == 0, starts)
    contradicts = present & absent
    identical = int((labels == labels[first]).all(axis=1).sum()) - len(kept)
    merged = np.where(present, 1, np.where(absent, 0, UNKNOWN)).astype(np.int8)

    note = f"{len(first):,} rows for {len(kept):,} images, {identical:,} of them with the labels of an earlier row"
    if contradicts.any() and how == "stop":
        several = np.unique(firsts)
        named = (labels == 1).sum(axis=1)[np.isin(first, several)]
        twice = (np.add.reduceat(labels[order] == 1, starts, dtype=np.int32) > 1).any()
        clear = one_label_a_row and (named == 1).all() and not twice
        if not clear or len(several) < _SHARE * len(kept):
            _refuse(columns, paths, class_names, first, kept, contradicts)
        note += "; each of the others adds a label"
    elif contradicts.any():
        note += f"; rows of {int(contradicts.any(axis=1).sum()):,} images contradict each other ({how})"
    if how == "unknown":
        merged[contradicts] = UNKNOWN
    return Merged(kept, merged, note)


def _refuse(
    columns: Columns,
    paths: StringArray,
    class_names: Sequence[str],
    first: NDArray[np.int64],
    kept: NDArray[np.int64],
    contradicts: NDArray[np.bool_],
) -> None:
    images = np.flatnonzero(contradicts.any(axis=1))
    found = []
    for i in images[:20].tolist():
        rows = " and ".join(str(row + columns.first_row) for row in np.flatnonzero(first == kept[i])[:5].tolist())
        name = class_names[int(contradicts[i].argmax())]
        found.append(f"{brief(str(paths[kept[i]]))} (rows {rows}), class {brief(name)}")
    more = f" ... and {len(images) - 20} more" if len(images) > 20 else ""
    raise DataError(
        f"{columns.path}: the same image with labels that contradict each other: {listed(found)}{more}; correct them, "
        "or set repeated: unknown (several annotators: labels on which they disagree are unknown) or repeated: union "
        "(one row per label)"
    )
