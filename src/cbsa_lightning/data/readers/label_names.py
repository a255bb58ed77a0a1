"""Reading of labels from a column with class names, and optionally from a column with classes to review."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import UNKNOWN
from cbsa_lightning.data.class_names import ClassFile, did_you_mean
from cbsa_lightning.data.readers.columns import Columns
from cbsa_lightning.data.readers.label_cells import LabelCells
from cbsa_lightning.data.readers.roles import REVIEW_COLUMN, named_like
from cbsa_lightning.data.readers.separators import Form
from cbsa_lightning.data.readers.words import Words
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief


class NamedLabels:
    """The columns of a table that contain class names.

    Args:
        columns: The table.
        column: The column of labels. Classes listed in a column named ``review``, if there is one, are unknown,
            regardless of the labels.
        words: Distinguishes class names from other words.
        form: The form in which a cell lists its names. With None, it is detected.
        known: Names and synonyms of the classes, if known.

    Attributes:
        labels: Names in the column of labels.
        reviewed: Names of the classes to review, or None.

    Raises:
        DataError: If ``LabelCells`` raises one, the table was written by Label Studio and has ambiguous empty cells, or
            a name to review is neither a label of another image nor a column.
    """

    def __init__(
        self, columns: Columns, column: str, words: Words, form: Form | None, known: Collection[str] | None
    ) -> None:
        self._columns, self._column = columns, column
        self.labels = LabelCells(columns, column, words, form, known)
        _refuse_empty_annotations(columns, self.labels)
        review = next((name for name in named_like(columns, (REVIEW_COLUMN,)) if name != column), None)
        self.reviewed: LabelCells | None = None
        if review is not None:
            form = form or (self.labels.form if self.labels.form.separator else None)
            known = known or {*self.labels.names, *columns.names}
            self.reviewed = LabelCells(columns, review, words, form, known)
            self._refuse_other_reviews(self.reviewed, known)

    def class_names(self) -> list[str]:
        """Returns all names in sorted order."""
        return sorted({*self.labels.names, *(self.reviewed.names if self.reviewed else ())})

    def matrix(self, classes: ClassFile) -> NDArray[np.int8]:
        """Returns the labels (n, C) of ``classes``: 1 present, 0 absent, -1 unknown.

        Raises:
            DataError: If a name is not a class.
        """
        labels = np.zeros((len(self.labels.known), len(classes.class_names)), dtype=np.int8)
        labels[~self.labels.known] = UNKNOWN
        labels[self._places(self.labels, classes)] = 1
        if self.reviewed is not None:
            labels[self._places(self.reviewed, classes)] = UNKNOWN
        return labels

    def most_names_in_a_row(self) -> int:
        """Returns the largest number of names in a row."""
        return int(np.bincount(self.labels.row, minlength=1).max())

    def _refuse_other_reviews(self, reviewed: LabelCells, known: Collection[str]) -> None:
        """Rejects free text in the review column. Its names must be labels of an image or known classes."""
        if wrong := [name for name in reviewed.names if name not in known]:
            where = self._columns.where(reviewed.first_row_of(wrong[0]))
            raise DataError(
                f"{where}: column {REVIEW_COLUMN!r} contains {listed(map(brief, wrong))}, which no image has as a "
                "label; correct them, list the classes in a class file, or rename the column if it is not a list of "
                "classes to review"
            )

    def _places(self, cells: LabelCells, classes: ClassFile) -> Any:
        """Returns the rows and classes of all names, for use as an index of a matrix."""
        position = classes.index()
        unknown = [
            f"{self._columns.row(cells.first_row_of(name))}: {brief(name)}{did_you_mean(name, position)}"
            for name in cells.names
            if name not in position
        ]
        if unknown:
            raise DataError(
                f"{self._columns.path}: names that are not classes of {classes.path}: {listed(unknown)}; correct them, "
                "remove them, or add them to a class file as classes or synonyms"
            )
        return cells.row, np.array([position[name] for name in cells.names], dtype=np.int64)[cells.code]


def _refuse_empty_annotations(columns: Columns, labels: LabelCells) -> None:
    """Rejects tables of Label Studio with empty cells in annotated rows, which mean "shows nothing"."""
    for name in named_like(columns, ("annotationid",)):
        annotated = pc.not_equal(columns.text(name).fill_null(""), "").to_numpy(zero_copy_only=False)
        if (unclear := annotated & ~labels.known).any():
            raise DataError(
                f"{columns.where(int(unclear.argmax()))}: the row has no labels, but an {name}. A labeling tool writes "
                "this for an image that shows no class; write 'none' there, or remove the column "
                f"{brief(name)} if the image is not labeled"
            )
