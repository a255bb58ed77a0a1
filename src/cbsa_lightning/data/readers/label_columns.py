"""Reading of labels from one column per class, which contains 1, 0 and -1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cbsa_lightning.data.class_names import ClassFile
from cbsa_lightning.data.readers.columns import Columns, column_named
from cbsa_lightning.data.readers.roles import ANNOTATOR_COLUMNS, LABELS_COLUMNS, PARTS_COLUMNS, named_like
from cbsa_lightning.data.readers.words import UNLABELED, Meaning, Words
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

_VALUES = {"1": 1, "true": 1, "0": 0, "false": 0, "-1": -1} | dict.fromkeys(sorted(UNLABELED), -1)


def class_columns(columns: Columns, image: str, words: Words) -> list[str]:
    """Returns all columns except those for paths, splits, annotators, or "shows nothing".

    Raises:
        DataError: If there are no such columns, or the name of a column is a word that is not a class.
    """
    others = named_like(columns, (*PARTS_COLUMNS, *ANNOTATOR_COLUMNS))
    found = []
    for name in columns.names:
        if name == image or (name in others and name not in words.classes):
            continue
        meaning = words.meaning(name)
        if meaning is Meaning.NAME:
            found.append(name)
        elif meaning is not Meaning.NOTHING:
            raise DataError(
                f"{columns.path}: column {brief(name)} does not have the name of a class. If 1 means that an "
                f"image shows no class, set nothing: [{name:.50}]; if it is a class, add it to a class file; otherwise "
                "remove it"
            )
    if not found:
        raise DataError(
            f"{columns.path}: the table has no labels; add a column named {LABELS_COLUMNS[0]!r} with class names, or "
            "one column per class; if a column with names is called differently, set labels_column"
        )
    return found


def labels_by_column(
    columns: Columns, image: str, classes: ClassFile, words: Words, other_columns: bool
) -> NDArray[np.int8]:
    """Reads labels from one column per class.

    Args:
        columns: The table.
        image: Name of the column with the paths.
        classes: The C classes. Columns may be named after their synonyms.
        words: Detects columns that mean "shows no class". If such a column is 1, all classes are absent.
        other_columns: Whether columns other than classes are allowed.

    Returns:
        Labels (n, C): 1 present, 0 absent, -1 unknown.

    Raises:
        DataError: If a class has no column or several, a column is not a class, or a cell is not a label.
    """
    meanings: dict[str, list[str]] = {name: [name] for name in classes.class_names}
    for other, name in classes.synonyms.items():
        meanings[name].append(other)
    chosen = [column_named(columns, names) for names in meanings.values()]
    if not other_columns:
        extra = [name for name in class_columns(columns, image, words) if name not in chosen]
        if extra:
            raise DataError(
                f"{columns.path}: columns that are not classes of {classes.path}: {listed(map(brief, extra))}; remove "
                "them, or list the classes in a class file"
            )
    labels = np.empty((columns.table.num_rows, len(chosen)), dtype=np.int8)
    for k, name in enumerate(chosen):
        labels[:, k] = _column_labels(columns, name)
    _apply_nothing(columns, [name for name in columns.names if name in words.nothing], labels, classes.class_names)
    return labels


def _apply_nothing(columns: Columns, names: list[str], labels: NDArray[np.int8], class_names: Sequence[str]) -> None:
    """Makes all classes absent in rows for which a column that means "shows nothing" is 1."""
    for name in names:
        nothing = _column_labels(columns, name) == 1
        wrong = np.flatnonzero(nothing & (labels == 1).any(axis=1))
        if len(wrong):
            row = int(wrong[0])
            shown = class_names[int((labels[row] == 1).argmax())]
            raise DataError(
                f"{columns.where(row)}: column {brief(name)}, which means that the image shows no class, and class "
                f"{brief(shown)} are both 1; correct one of them"
            )
        labels[nothing] = 0


def _column_labels(columns: Columns, name: str) -> NDArray[np.int8]:
    cells = columns.text(name).fill_null("")
    # Excel and pandas also write TRUE, True, 1.0, 1.00 and None.
    plain = pc.utf8_lower(pc.replace_substring_regex(cells, "^None$", ""))
    plain = pc.replace_substring_regex(plain, r"^(-?\d)\.0*$", r"\1")
    codes = pc.index_in(plain, value_set=pa.array(list(_VALUES), pa.large_string()))
    if codes.null_count:
        wrong = np.flatnonzero(codes.is_null().to_numpy(zero_copy_only=False))
        found = listed(f"{brief(cells[int(i)].as_py())} ({columns.row(int(i))})" for i in wrong)
        raise DataError(
            f"{columns.path}, class {brief(name)}: cells must be 1 (present), 0 (absent), -1 or empty (unknown); "
            f"found {found}; correct them, or exclude columns that are not classes with a class file"
        )
    values = np.array(list(_VALUES.values()), dtype=np.int8)
    return np.asarray(values[codes.to_numpy(zero_copy_only=False)], dtype=np.int8)
