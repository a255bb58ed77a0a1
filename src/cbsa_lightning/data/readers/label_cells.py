"""Reading of a column with class names into flat arrays of rows and names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cbsa_lightning.data.class_names import clean_name
from cbsa_lightning.data.readers.columns import Columns
from cbsa_lightning.data.readers.separators import Form, detect
from cbsa_lightning.data.readers.words import NO_LABEL, Meaning, Words, begins_a_list
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief


class LabelCells:
    """The class names in one column.

    Args:
        columns: The table.
        column: Name of the column.
        words: Distinguishes class names from other words.
        form: The form in which a cell lists its names. With None, it is detected.
        known: Names and synonyms of the classes, if known.

    Attributes:
        form: The form in which a cell lists its names.
        known: (n,) bool, False for unlabeled rows.
        row: (k,) the row of each occurrence of a name.
        code: (k,) the position in ``names`` of each occurrence.
        names: The distinct names.

    Raises:
        DataError: If the form of the cells is unclear, a name is empty or does not look like a class name, or a word
            that means "not labeled" or "shows nothing" occurs together with a name.
    """

    def __init__(
        self,
        columns: Columns,
        column: str,
        words: Words,
        form: Form | None = None,
        known: Collection[str] | None = None,
    ) -> None:
        self._columns, self._column, self._words = columns, column, words
        if columns.has_lists(column):
            self.form = Form(lists=True)
            self._read_lists(columns.lists(column))
        else:
            self._read_cells(columns.text(column).fill_null("").dictionary_encode(), form, known)
        self._take_words_out()

    def first_row_of(self, name: str) -> int:
        """Returns the first row in which ``name`` occurs."""
        return int(self.row[np.argmax(self.code == self.names.index(name))])

    def _read_lists(self, lists: Any) -> None:
        self.known: NDArray[np.bool_] = lists.is_valid().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        self.row: NDArray[np.int64] = np.repeat(np.arange(len(lengths)), lengths)
        values = pc.list_flatten(lists).fill_null("").dictionary_encode()
        names = [clean_name(name) for name in values.dictionary.to_pylist()]
        self._encode(names, values.indices.to_numpy(zero_copy_only=False))

    def _read_cells(self, cells: Any, form: Form | None, known: Collection[str] | None) -> None:
        """Splits each distinct cell once."""
        texts: list[str] = cells.dictionary.to_pylist()
        cell_of_row = cells.indices.to_numpy(zero_copy_only=False)

        def where(text: str) -> str:
            return self._columns.where(int(np.argmax(cell_of_row == texts.index(text))))

        empty_list = re.compile(r"\[\s*\]")
        meanings = [Meaning.NOTHING if empty_list.fullmatch(text) else self._words.meaning(text) for text in texts]
        with_names = []
        for text, meaning in zip(texts, meanings, strict=True):
            if meaning is Meaning.UNCLEAR and not begins_a_list(text):
                self._refuse_unclear(text, where(text))
            if meaning in (Meaning.NAME, Meaning.UNCLEAR):
                with_names.append(text)
        self.form = detect(with_names, where, known) if form is None else form
        split = {text: self.form.split(text) for text in with_names}
        names = [split.get(text, []) for text in texts]
        lengths = np.array([len(some) for some in names], dtype=np.int64)
        flat = [name for some in names for name in some]

        self.known = np.array([meaning is not Meaning.UNLABELED for meaning in meanings])[cell_of_row]
        # Each row is assigned the names of its cell, which are consecutive in `flat`.
        of_row = lengths[cell_of_row]
        self.row = np.repeat(np.arange(len(of_row)), of_row)
        within = np.arange(len(self.row)) - np.repeat(np.cumsum(of_row) - of_row, of_row)
        starts = (np.cumsum(lengths) - lengths)[cell_of_row]
        self._encode(flat, np.repeat(starts, of_row) + within)

    def _encode(self, names: list[str], code: NDArray[Any]) -> None:
        """Sets ``names`` and ``code``, given names that may be repeated and indices of these names."""
        position: dict[str, int] = {}
        new = np.array([position.setdefault(name, len(position)) for name in names], dtype=np.int64)
        self.names = list(position)
        self.code: NDArray[np.int64] = new[code] if len(code) else np.zeros(0, np.int64)

    def _take_words_out(self) -> None:
        """Removes words that are not class names and applies their meaning."""
        if "" in self.names:
            mark = repr(self.form.separator) if self.form.separator else "entry"
            raise DataError(
                f"{self._columns.where(self.first_row_of(''))}: a name in column {self._column!r} is empty; remove the "
                f"extra {mark}, and write {NO_LABEL!r} if the image shows no class"
            )
        meanings = [self._words.meaning(name) for name in self.names]
        count = np.bincount(self.row, minlength=len(self.known))
        for name, meaning in zip(self.names, meanings, strict=True):
            if meaning is Meaning.UNCLEAR:
                self._refuse_unclear(name, self._columns.where(self.first_row_of(name)))
            if meaning is Meaning.NAME:
                continue
            rows = self.row[self.code == self.names.index(name)]
            if (both := count[rows] > 1).any():
                raise DataError(
                    f"{self._columns.where(int(rows[both][0]))}: {name!r} occurs together with another name, but "
                    f"{name!r} means "
                    f"{'no class at all' if meaning is Meaning.NOTHING else 'that the image is not labeled'}; remove "
                    "one of them, or, if it is a class, add it to a class file"
                )
            self.known[rows] = meaning is Meaning.NOTHING
        is_name = np.array([meaning is Meaning.NAME for meaning in meanings], dtype=bool)
        kept = is_name[self.code]
        self.row, self.code = self.row[kept], (np.cumsum(is_name) - 1)[self.code[kept]]
        self.names = [name for name, named in zip(self.names, is_name, strict=True) if named]

    def _refuse_unclear(self, name: str, where: str) -> None:
        if name[0] in "[{'\"":
            raise DataError(
                f"{where}: {brief(name)} in column {brief(self._column)} is part of a list or in quotes. Omit the "
                "option separator, so that lists are recognized, and omit quotes as well. If it is a class, add it to "
                "a class file"
            )
        raise DataError(
            f"{where}: {brief(name)} in column {brief(self._column)} does not look like a class. If it means that an "
            f"image shows no class, write {NO_LABEL!r} or set nothing: [{name:.50}]; if the labels are unknown, leave "
            "the cell empty; if it is a class, add it to a class file"
        )
