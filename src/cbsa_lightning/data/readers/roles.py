"""Which column of a table holds what: paths, names of classes, parts of a data set, annotators."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pyarrow.compute as pc

from cbsa_lightning.data.class_names import clean_name, did_you_mean
from cbsa_lightning.data.readers.columns import Columns
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

# Compared without case, blanks, "_" and "-": "Image Index" is "imageindex". Of several, the first in this order counts.
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

# A cell of a class column: present, absent or unknown.
LABEL_CELL = r"^(-?1|0)(\.0*)?$|^(true|false|)$"


def image_column(columns: Columns, name: str | None = None) -> str:
    """The column with the paths: ``name``, or the first of ``IMAGE_COLUMNS`` that is there.

    Raises:
        DataError: There is none, or two have that name but for its spelling.
    """
    if name is not None:
        return _given(columns, name, "image_column")
    found = _first(columns, IMAGE_COLUMNS, columns.names, "image_column")
    if found is None:
        raise DataError(
            f"{columns.path}: no image column; its columns are {listed(map(brief, columns.names))}; name the "
            f"one with the paths {' or '.join(IMAGE_COLUMNS)}, or give its name as image_column"
        )
    return found


def labels_column(columns: Columns, image: str, name: str | None, classes: Collection[str] = ()) -> str | None:
    """The column with names of classes; None for a table with one column a class.

    Args:
        columns: The table.
        image: Its column with the paths.
        name: The column that the user names; None for the first of ``LABELS_COLUMNS`` that is there.
        classes: Names and synonyms of a class file, which are columns of classes where they are columns.

    Raises:
        DataError: There is no column ``name``, or the columns of the table can be read in two ways.
    """
    if name is not None:
        return _given(columns, name, "labels_column")
    others = [other for other in columns.names if other != image and other not in classes]
    found = _first(columns, LABELS_COLUMNS, others, "labels_column")
    if found is None:
        return None
    if _is_class_column(columns, found):
        raise DataError(
            f"{columns.path}: column {brief(found)} has no cells but 1, 0 or -1, so it may be a class or hold names of "
            f"classes; name the class in a class file, or give labels_column: {found} if these are names"
        )
    others = [other for other in others if _key(other) not in (*PARTS_COLUMNS, *ANNOTATOR_COLUMNS, *SCORE_COLUMNS)]
    if found != LABELS_COLUMNS[0] and (also := [other for other in others if _is_class_column(columns, other)]):
        raise DataError(
            f"{columns.path}: column {brief(found)} has names, and columns {listed(map(brief, also))} have 1 and 0 as "
            f"those of classes do; give labels_column: {found} to read the names alone, or take {brief(found)} out"
        )
    return found


def named_like(columns: Columns, names: Sequence[str]) -> list[str]:
    """Columns whose names are among ``names``, whatever their spelling."""
    return [column for column in columns.names if _key(column) in names]


def refuse_parts(columns: Columns, chosen: Collection[str]) -> None:
    """Refuses a column that divides the images into parts, such as training and test.

    Args:
        columns: The table.
        chosen: Columns that have another meaning: those of paths, of names, and of classes that a class file names.

    Raises:
        DataError: There is one, with more than one value.
    """
    for name in named_like(columns, PARTS_COLUMNS):
        if name in chosen:
            continue
        parts = pc.unique(columns.text(name).fill_null("")).to_pylist()
        if len(parts) > 1:
            raise DataError(
                f"{columns.path}: a column {brief(name)} is refused; it divides the images into parts "
                f"({listed(map(brief, sorted(parts)), 5)}), and all of them would be trained on. Write each part to a "
                "table of its own, give them as train and test, and take the column out; if it is a class, name it in "
                "a class file"
            )


def _given(columns: Columns, name: str, option: str) -> str:
    if clean_name(name) not in columns.names:
        raise DataError(
            f"{columns.path}: no column {brief(name)}, which {option} names{did_you_mean(name, columns.names)}; its "
            f"columns are {listed(map(brief, columns.names))}; correct {option}"
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
                f"{columns.path}: columns {listed(map(brief, found))} may both be meant; name one of them as {option}"
            )
        if found:
            return found[0]
    return None


def _is_class_column(columns: Columns, name: str) -> bool:
    """Whether a column has no cells but 1, 0, -1, true, false and empty ones, and not only empty ones."""
    if columns.has_lists(name):
        return False
    try:
        cells = pc.utf8_lower(columns.text(name).fill_null(""))
    except DataError:  # a column of another type, or damaged, which nobody reads
        return False
    empty = pc.all(pc.equal(cells, "")).as_py()
    return not empty and bool(pc.all(pc.match_substring_regex(cells, LABEL_CELL)).as_py())


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()
