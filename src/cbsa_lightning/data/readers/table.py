"""People's own tables, CSV or Parquet: one row an image, labels by name or by column."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cbsa_lightning.arguments import check_flags, check_kind, check_paths
from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable
from cbsa_lightning.data.class_names import (
    ClassFile,
    check_class_names,
    check_prompt_names,
    clean_name,
    default_prompts,
    did_you_mean,
    read_class_file,
)
from cbsa_lightning.data.readers.columns import (
    IMAGE_COLUMNS,
    Columns,
    column_named,
    read_columns,
    refuse_repeated_rows,
)
from cbsa_lightning.data.readers.source import Source, tidy_paths
from cbsa_lightning.data.reading import brief
from cbsa_lightning.errors import ConfigError, DataError, listed

LABELS_COLUMN = "labels"
NO_LABEL = "none"
# Spellings of a label in a class column; pandas writes 1.0 where a column has gaps, and True.
_CELLS = {"1": 1, "1.0": 1, "True": 1, "true": 1, "0": 0, "0.0": 0, "False": 0, "false": 0}
_CELLS |= {"-1": -1, "-1.0": -1, "": -1, "nan": -1}


class Table(Source):
    """A data set of one's own: a CSV or Parquet table to train on, and one to test on if there is one.

    The column ``image``, ``path``, ``file`` or ``filename`` (the first of these that is there) holds paths.
    Labels stand in one of two forms:

    - by name: a column ``labels`` with class names and ``separator`` between them (in Parquet also a list).
      An empty cell means that nothing is known of the image: it is unlabelled. ``none`` means that it shows
      no class. Other columns are not read.
    - by column: one column a class, with 1 (present), 0 (absent), and -1 or an empty cell (unknown).

    The classes are those of the class file if there is one: names may then be its synonyms, and columns that
    it does not name are not read. Else they are those of the training table: its names, sorted, or all its
    columns but the image's, in their order; the test table must then have the same.

    Args:
        train: Table to train on; its unlabelled rows are the unlabelled images.
        test: Table to test on.
        root: Folder that paths are relative to; default: the folder of each table.
        class_file: Class file with classes, prompt names and synonyms (``read_class_file``).
        separator: What stands between the names in a ``labels`` cell.
        allow_outside: Whether paths may leave ``root``.

    Raises:
        ConfigError: ``separator`` is empty, or an argument is of another type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_file: str | None = None,
        *,
        separator: str = ";",
        allow_outside: bool = False,
    ) -> None:
        check_kind(
            "Table: train", train, (str, os.PathLike), "the path of a table; write a DataFrame with to_csv first"
        )
        if train is None:
            raise ConfigError("Table: train is None; give the path of a table.")
        check_paths(**{"Table: test": test, "Table: root": root, "Table: class_file": class_file})
        check_flags(**{"Table: allow_outside": allow_outside})
        if not isinstance(separator, str) or not separator.strip():
            raise ConfigError(f"table separator {separator!r} is empty; names need a visible mark between them")
        self._train, self._test, self._root, self._class_file = train, test, root, class_file
        self._separator, self._allow_outside = separator, allow_outside

    def __repr__(self) -> str:
        return f"Table(train={self._train!r}, test={self._test!r}, class_file={self._class_file!r})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the class file, or of the training table."""
        return self._classes.class_names

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompt names of the class file, or the class names with "_" as a space."""
        return self._classes.prompt_names

    def prepare(self) -> None:
        """Checks that tables and class file are there.

        Raises:
            DataError: One is not.
        """
        named = (("train", self._train), ("test", self._test), ("class_file", self._class_file))
        if missing := [f"{path} ({what})" for what, path in named if path and not os.path.isfile(path)]:
            raise DataError(f"no file at {listed(missing)}; put it there or correct the path")

    def train(self) -> AnnotationTable:
        """The training table; see ``read_table`` for what is refused."""
        return self._read(self._train)

    def test(self) -> AnnotationTable | None:
        """The test table, or None."""
        return None if self._test is None else self._read(self._test)

    @cached_property
    def _classes(self) -> ClassFile:
        if self._class_file is not None:
            return read_class_file(self._class_file)
        return find_classes(self._train, self._separator)

    def _read(self, path: str) -> AnnotationTable:
        return read_table(
            path,
            self._classes,
            root=self._root,
            separator=self._separator,
            allow_outside=self._allow_outside,
            other_columns=self._class_file is not None,
        )


def find_classes(path: str | Path, separator: str = ";") -> ClassFile:
    """The classes that a table itself names: sorted names of ``labels``, or its class columns in order.

    Raises:
        DataError: There are none, or two would have the same prompt text.
    """
    columns = read_columns(path)
    if LABELS_COLUMN in columns.names:
        found = sorted({clean_name(name) for name in _Names(columns, separator).names} - {NO_LABEL})
        place = f"{path}, column {LABELS_COLUMN!r}"
    else:
        found, place = _class_columns(columns), f"{path}, columns"
    names = check_class_names(found, place)
    return ClassFile(Path(path), names, check_prompt_names(names, default_prompts(names), place), {})


def read_table(
    path: str | Path,
    classes: ClassFile | None = None,
    *,
    root: str | Path | None = None,
    separator: str = ";",
    allow_outside: bool = False,
    other_columns: bool = True,
) -> AnnotationTable:
    """Reads one table; ``Table`` describes its form.

    Args:
        path: CSV or Parquet file.
        classes: The classes to read; default: those that the table names itself.
        root: Folder that paths are relative to; default: the folder of the table.
        separator: What stands between the names in a ``labels`` cell.
        allow_outside: Whether paths may leave ``root``.
        other_columns: Whether columns that are no class may stand beside class columns.

    Raises:
        DataError: There is no image column or no label, an image is listed twice, a path is empty or leaves
            ``root``, a class is unknown, or a cell is no label. Each with its row.
    """
    columns = read_columns(path)
    classes = classes or find_classes(path, separator)
    root = Path(path).parent if root is None else Path(root)
    paths = tidy_paths(root, root, columns.image_paths(), columns.where, allow_outside)
    refuse_repeated_rows(columns, paths)
    if LABELS_COLUMN in columns.names:
        labels = _labels_by_name(columns, classes, separator)
    else:
        labels = _labels_by_column(columns, classes, other_columns)
    return AnnotationTable(root, paths, labels, classes.class_names, classes.prompt_names)


class _Names:
    """The names of a ``labels`` column, flat.

    Attributes:
        known: (n,) bool, False for a row of which nothing is known.
        row: (k,) row of each name that is written.
        code: (k,) its position in ``names``.
        names: The different names.
    """

    def __init__(self, columns: Columns, separator: str) -> None:
        column = columns.table.column(LABELS_COLUMN)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            lists = columns.lists(LABELS_COLUMN)
        else:
            cells = columns.text(LABELS_COLUMN)
            lists = pc.split_pattern(pc.if_else(pc.equal(cells, ""), None, cells), separator)
        self.known: NDArray[np.bool_] = lists.is_valid().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        self.row: NDArray[np.int64] = np.repeat(np.arange(len(lengths)), lengths)
        values = pc.utf8_trim_whitespace(pc.list_flatten(lists).fill_null("")).dictionary_encode()
        self.code: NDArray[np.int32] = values.indices.to_numpy(zero_copy_only=False)
        self.names: list[str] = values.dictionary.to_pylist()
        if "" in self.names:
            where = columns.where(self.first_row_of(""))
            raise DataError(
                f"{where}: an empty name in column {LABELS_COLUMN!r}; take the spare {separator!r} out, and "
                f"write {NO_LABEL!r} if the image shows no class"
            )

    def first_row_of(self, name: str) -> int:
        """The first row that has ``name``."""
        return int(self.row[np.argmax(self.code == self.names.index(name))])


def _labels_by_name(columns: Columns, classes: ClassFile, separator: str) -> NDArray[np.int8]:
    found, position = _Names(columns, separator), classes.index()
    if NO_LABEL in position:
        raise DataError(
            f"{classes.path}: a class cannot be called {NO_LABEL!r}, which means no class in column "
            f"{LABELS_COLUMN!r}; rename it, or give one column a class"
        )
    names = [clean_name(name) for name in found.names]
    unknown = [
        f"row {found.first_row_of(written) + columns.first_row}: {brief(name)}{did_you_mean(name, position)}"
        for written, name in zip(found.names, names, strict=True)
        if name not in position and name != NO_LABEL
    ]
    if unknown:
        raise DataError(
            f"{columns.path}: names that are no class of {classes.path}: {listed(unknown)}; correct them, or "
            "add them to the class file as classes or synonyms"
        )
    target = np.array([position.get(name, -1) for name in names], dtype=np.int64)[found.code]
    count = np.bincount(found.row, minlength=len(found.known))
    empty = found.row[target == -1]
    if (both := count[empty] > 1).any():
        where = columns.where(int(empty[both][0]))
        raise DataError(f"{where}: {NO_LABEL!r} beside another name; {NO_LABEL!r} means no class at all")
    labels = np.zeros((len(found.known), len(classes.class_names)), dtype=np.int8)
    labels[~found.known] = UNKNOWN
    named = target >= 0
    labels[found.row[named], target[named]] = 1
    return labels


def _class_columns(columns: Columns) -> list[str]:
    """All columns but the one with the paths."""
    image = next((name for name in IMAGE_COLUMNS if name in columns.names), None)
    found = [name for name in columns.names if name != image]
    if not found:
        raise DataError(f"{columns.path}: no labels; add a column {LABELS_COLUMN!r} with names, or one column a class")
    return found


def _labels_by_column(columns: Columns, classes: ClassFile, other_columns: bool) -> NDArray[np.int8]:
    available = _class_columns(columns)
    meanings: dict[str, list[str]] = {name: [name] for name in classes.class_names}
    for other, name in classes.synonyms.items():
        meanings[name].append(other)
    chosen = [column_named(columns, names) for names in meanings.values()]
    if not other_columns and (extra := [name for name in available if name not in chosen]):
        raise DataError(
            f"{columns.path}: columns that are no class of {classes.path}: {listed(map(brief, extra))}; take "
            "them out, or name the classes in a class file"
        )
    labels = np.empty((columns.table.num_rows, len(chosen)), dtype=np.int8)
    for k, name in enumerate(chosen):
        labels[:, k] = _column_labels(columns, name)
    return labels


def _column_labels(columns: Columns, name: str) -> NDArray[np.int8]:
    spellings: Any = pa.array(list(_CELLS), pa.large_string())
    cells = columns.text(name).fill_null("")
    codes = pc.index_in(cells, value_set=spellings)
    if codes.null_count:
        wrong = np.flatnonzero(codes.is_null().to_numpy(zero_copy_only=False))
        found = listed(f"{brief(cells[int(i)].as_py())} (row {i + columns.first_row})" for i in wrong)
        raise DataError(
            f"{columns.path}, class {brief(name)}: cells must be 1 (present), 0 (absent), -1 or empty (unknown); "
            f"found {found}; correct them, or leave columns that are no class out with a class file"
        )
    values = np.array(list(_CELLS.values()), dtype=np.int8)
    return np.asarray(values[codes.to_numpy(zero_copy_only=False)], dtype=np.int8)
