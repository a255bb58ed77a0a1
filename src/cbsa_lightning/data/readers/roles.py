"""Detection of the roles of a table's columns: paths, class names, splits, annotators."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pyarrow.compute as pc

from cbsa_lightning.data.class_names import clean_name, did_you_mean
from cbsa_lightning.data.readers.columns import Columns
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

# Case, blanks, "_" and "-" are ignored, so "Image Index" matches "imageindex". The first match is used.
IMAGE_COLUMNS = (
    "image", "path", "file", "filename", "imagepath", "filepath", "imagename", "imagefile", "imageid", "imageindex",
    "fname", "img", "imgpath", "imgname", "imgid", "photo", "images",
)  # fmt: skip
LABELS_COLUMNS = (
    "labels", "label", "tags", "tag", "classes", "class", "categories", "category", "keywords", "findinglabels",
)  # fmt: skip
PARTS_COLUMNS = ("split", "fold", "kfold", "isvalid", "isval", "istest", "istrain", "subset", "partition")
ANNOTATOR_COLUMNS = (
    "annotator", "annotatorid", "annotationid", "annotatedby", "completedby", "rater", "raterid", "labeler", "labeller",
    "labelerid", "workerid", "userid",
)  # fmt: skip
SCORE_COLUMNS = ("confidence", "score", "probability")
REVIEW_COLUMN = "review"

# Regular expression of the cells in a class column, which mean present, absent or unknown.
LABEL_CELL = r"^(-?1|0)(\.0*)?$|^(true|false|)$"


def image_column(columns: Columns, name: str | None = None) -> str:
    """Returns the column with the paths, which is ``name`` or the first match of ``IMAGE_COLUMNS``.

    Raises:
        DataError: If there is no such column, or several differ only in spelling.
    """
    if name is not None:
        return _given(columns, name, "image_column")
    found = _first(columns, IMAGE_COLUMNS, columns.names, "image_column")
    if found is None:
        raise DataError(
            f"{columns.path}: there is no image column; the columns are {listed(map(brief, columns.names))}; name the "
            f"column with the paths {' or '.join(IMAGE_COLUMNS)}, or give its name as image_column"
        )
    return found


def labels_column(columns: Columns, image: str, name: str | None, classes: Collection[str] = ()) -> str | None:
    """Returns the column with class names, or None if the table has one column per class.

    Args:
        columns: The table.
        image: The column with the paths.
        name: The column that the user has specified. None uses the first match of ``LABELS_COLUMNS``.
        classes: Names and synonyms in a class file. Columns with these names are class columns.

    Raises:
        DataError: If there is no column named ``name``, or the roles of the columns are ambiguous.
    """
    if name is not None:
        return _given(columns, name, "labels_column")
    others = [other for other in columns.names if other != image and other not in classes]
    found = _first(columns, LABELS_COLUMNS, others, "labels_column")
    if found is None:
        return None
    if _is_class_column(columns, found):
        raise DataError(
            f"{columns.path}: column {brief(found)} has only 1, 0 or -1 in its cells, so it may be a class or contain "
            f"names of classes; add the class to a class file, or set labels_column: {found} if these are names"
        )
    others = [other for other in others if _key(other) not in (*PARTS_COLUMNS, *ANNOTATOR_COLUMNS, *SCORE_COLUMNS)]
    if found != LABELS_COLUMNS[0] and (also := [other for other in others if _is_class_column(columns, other)]):
        raise DataError(
            f"{columns.path}: column {brief(found)} has names, but columns {listed(map(brief, also))} contain 1 and 0 "
            f"like class columns; set labels_column: {found} to read only the names, or remove {brief(found)}"
        )
    return found


def named_like(columns: Columns, names: Sequence[str]) -> list[str]:
    """Returns the columns whose names are among ``names``, ignoring differences in spelling."""
    return [column for column in columns.names if _key(column) in names]


def refuse_parts(columns: Columns, chosen: Collection[str]) -> None:
    """Rejects a column that divides the images into splits, such as training and test.

    Args:
        columns: The table.
        chosen: Columns with another role, such as paths, names, and classes of a class file.

    Raises:
        DataError: If there is such a column with more than one value.
    """
    for name in named_like(columns, PARTS_COLUMNS):
        if name in chosen:
            continue
        parts = pc.unique(columns.text(name).fill_null("")).to_pylist()
        if len(parts) > 1:
            raise DataError(
                f"{columns.path}: the column {brief(name)} is refused because it divides the images into parts "
                f"({listed(map(brief, sorted(parts)), 5)}), and all of them would be used for training. Write each "
                "part to a separate table, give them as train and test, and remove the column; if it is a class, add "
                "it to a class file"
            )


def _given(columns: Columns, name: str, option: str) -> str:
    if clean_name(name) not in columns.names:
        raise DataError(
            f"{columns.path}: there is no column named {brief(name)}, given as {option}"
            f"{did_you_mean(name, columns.names)}; the columns are {listed(map(brief, columns.names))}; "
            f"correct {option}"
        )
    return clean_name(name)


def _first(columns: Columns, names: Sequence[str], among: Sequence[str], option: str) -> str | None:
    keys = [_key(column) for column in among]
    for name in names:
        found = [column for column, key in zip(among, keys, strict=True) if key == name]
        if len(found) > 1 and name in found:
            return name
        if len(found) > 1:
            raise DataError(
                f"{columns.path}: columns {listed(map(brief, found))} are ambiguous; set {option} to one of them"
            )
        if found:
            return found[0]
    return None


def _is_class_column(columns: Columns, name: str) -> bool:
    """Returns whether all cells of a column are 1, 0, -1, true, false or empty, and not all are empty."""
    if columns.has_lists(name):
        return False
    try:
        cells = pc.utf8_lower(columns.text(name).fill_null(""))
    except DataError:  # a damaged column, or one of another type, which is not used
        return False
    empty = pc.all(pc.equal(cells, "")).as_py()
    return not empty and bool(pc.all(pc.match_substring_regex(cells, LABEL_CELL)).as_py())


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()
