"""A data set of one's own: a table of images and labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property

from cbsa_lightning.arguments import check_flags, check_kind, check_paths
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import ClassFile, read_class_file
from cbsa_lightning.data.readers.repeated import Repeated
from cbsa_lightning.data.readers.source import Source, require_named
from cbsa_lightning.data.readers.table_reading import TableForm, find_classes, read_table
from cbsa_lightning.errors import ConfigError

__all__ = ["Table", "read_table"]


class Table(Source):
    """A data set of one's own: a table to train on, and one to test on if there is one.

    A table is a CSV, Parquet or JSON lines file (``read_columns``) with a column of paths. Labels stand in one of two
    forms:

    - by name: a column such as ``labels`` or ``tags`` with names of classes. How a cell lists them (``a;b``,
      ``a, b``, ``a|b``, lists of JSON or Python, blanks) is detected from all cells (``detect``). An empty cell means
      that nothing is known of the image: it is unlabeled, as with ``nan``, ``NA``, ``NULL`` or ``-``. ``none`` and
      ``[]`` mean that it shows no class. A column ``review`` names classes of which nothing is known, whatever the
      labels say. Other columns are not read.
    - by column: one column a class, with 1 (present), 0 (absent), and -1 or an empty cell (unknown).

    The classes are those of the class file if there is one: names may then be its synonyms, and columns that
    it does not name are not read. Else they are those of the training table: its names, sorted, or all its
    columns but the image's, in their order; the test table must then have the same.

    Several rows for one image become one.

    Args:
        train: Table to train on; its unlabeled rows are the unlabeled images.
        test: Table to test on.
        root: Folder that paths are relative to; default: the folder of each table.
        class_file: Class file with classes, prompt names and synonyms (``read_class_file``).
        separator: What separates the names in a labels cell; " " for any blanks. Default: detected.
        image_column: The column with the paths. Default: ``image``, ``path``, ``file``, ``filename`` or another name
            of ``IMAGE_COLUMNS``, in any case.
        labels_column: The column with names of classes. Default: ``labels``, ``label``, ``tags`` or another name of
            ``LABELS_COLUMNS``, in any case.
        nothing: Words that mean that an image shows no class, such as "No Finding".
        repeated: What becomes of a class that one row of an image says is present and another says is absent: an error
            ("stop"; a table with a row for each label is merged), -1 ("unknown"), or present ("union").
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
        separator: str | None = None,
        image_column: str | None = None,
        labels_column: str | None = None,
        nothing: Sequence[str] = (),
        repeated: Repeated = "stop",
        allow_outside: bool = False,
    ) -> None:
        check_kind(
            "Table: train", train, (str, os.PathLike), "the path of a table; write a DataFrame with to_csv first"
        )
        if train is None:
            raise ConfigError("Table: train is None; give the path of a table.")
        check_paths(**{"Table: test": test, "Table: root": root, "Table: class_file": class_file})
        check_flags(**{"Table: allow_outside": allow_outside})
        self._train, self._test, self._root, self._class_file = train, test, root, class_file
        self._form = TableForm(separator, image_column, labels_column, nothing, repeated)
        self._allow_outside = allow_outside
        self._notes: dict[str, list[str]] = {}

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
        require_named([("train", self._train), ("test", self._test or None), ("class_file", self._class_file or None)])

    def train(self) -> AnnotationTable:
        """The training table; see ``read_table`` for what is refused."""
        return self._read(self._train, self._classes)

    def test(self) -> AnnotationTable | None:
        """The test table, or None."""
        return None if self._test is None else self._read(self._test, self._classes)

    def test_under(self, classes: ClassFile) -> AnnotationTable | None:
        """The test table under given classes, or under those of the class file; the training table is not read."""
        own = self._classes if self._class_file is not None else classes
        return None if self._test is None else self._read(self._test, own)

    def describe(self) -> list[str]:
        """What was detected in each table: columns, how cells list names, rows that were merged."""
        for path in (self._train, self._test):
            if path is not None and path not in self._notes:
                self._read(path, self._classes)
        return [note for notes in self._notes.values() for note in notes]

    @cached_property
    def _classes(self) -> ClassFile:
        if self._class_file is not None:
            return read_class_file(self._class_file)
        return find_classes(self._train, self._form)

    def _read(self, path: str, classes: ClassFile) -> AnnotationTable:
        notes: list[str] = []
        table = read_table(
            path,
            classes,
            form=self._form,
            root=self._root,
            allow_outside=self._allow_outside,
            other_columns=self._class_file is not None,
            notes=notes,
        )
        self._notes[path] = notes
        return table
