"""Custom data sets, given as tables of images and labels."""

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
    """A custom data set, which consists of a training table and optionally a test table.

    A table is a CSV, Parquet or JSON lines file (see ``read_columns``) with a column of paths, or a set of Arrow files
    that contain the images (see :mod:`cbsa_lightning.data.shards`). It contains labels in one of two forms:

    - By name: a column such as ``labels`` or ``tags`` contains class names. The form in which a cell lists them
      (``a;b``, ``a, b``, ``a|b``, lists of JSON or Python, blanks) is detected from all cells (see ``detect``). If the
      cell is empty, ``nan``, ``NA``, ``NULL`` or ``-``, the image is unlabeled. ``none`` and ``[]`` mean that it shows
      no class. The classes in a column named ``review`` are unknown, regardless of the labels. Other columns are not
      read.
    - By column: each class has a column with 1 (present), 0 (absent), and -1 or an empty cell (unknown).

    The classes are those of the class file if there is one. Names may then be synonyms, and columns that are not in the
    class file are not read. Otherwise, the classes are those of the training table, that is, its names in sorted order,
    or all its columns except the image column. The test table must then have the same classes.

    If an image has several rows, they are merged.

    Args:
        train: Training table, or a pattern of Arrow files such as ``data/train-*.arrow``. Its unlabeled rows are the
            unlabeled images.
        test: Test table.
        root: Folder that paths are relative to. Defaults to the folder that contains each table.
        class_file: Class file with classes, prompt names and synonyms (see ``read_class_file``).
        separator: Separator of the names in a labels cell; " " means any blanks. By default, it is detected.
        image_column: The column with the paths. Defaults to ``image``, ``path``, ``file``, ``filename`` or another name
            in ``IMAGE_COLUMNS``, ignoring case.
        labels_column: The column with class names. Defaults to ``labels``, ``label``, ``tags`` or another name in
            ``LABELS_COLUMNS``, ignoring case.
        nothing: Words that mean that an image shows no class, such as "No Finding".
        repeated: Label of a class that is present in one row of an image and absent in another. "unknown" means -1, and
            "union" means present. "stop" raises an error, but a table with one row per label is merged.
        allow_outside: Whether paths may be outside ``root``.

    Raises:
        ConfigError: If ``separator`` is empty, or an argument has the wrong type.
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
        """The classes of the class file or of the training table."""
        return self._classes.class_names

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompt names of the class file, or the class names with "_" replaced by a space."""
        return self._classes.prompt_names

    def prepare(self) -> None:
        """Checks that the tables and the class file exist.

        Raises:
            DataError: If a file does not exist.
        """
        require_named([("train", self._train), ("test", self._test or None), ("class_file", self._class_file or None)])

    def train(self) -> AnnotationTable:
        """Returns the training table. See ``read_table`` for errors."""
        return self._read(self._train, self._classes)

    def test(self) -> AnnotationTable | None:
        """Returns the test table, or None."""
        return None if self._test is None else self._read(self._test, self._classes)

    def test_under(self, classes: ClassFile) -> AnnotationTable | None:
        """Returns the test table for the given classes or those of the class file. Does not read the training table."""
        own = self._classes if self._class_file is not None else classes
        return None if self._test is None else self._read(self._test, own)

    def describe(self) -> list[str]:
        """Returns notes on the columns, the form of the cells, and the merged rows of each table."""
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
