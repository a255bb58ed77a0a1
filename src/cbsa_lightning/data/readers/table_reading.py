"""Reading of a table of images and labels. Its form is detected unless options specify it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cbsa_lightning.arguments import check_choice, check_names
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import (
    ClassFile,
    check_class_names,
    check_prompt_names,
    clean_name,
    default_prompts,
)
from cbsa_lightning.data.readers.columns import Columns, read_columns
from cbsa_lightning.data.readers.label_columns import class_columns, labels_by_column
from cbsa_lightning.data.readers.label_names import NamedLabels
from cbsa_lightning.data.readers.repeated import CHOICES, Repeated, merge_rows
from cbsa_lightning.data.readers.roles import (
    ANNOTATOR_COLUMNS,
    SCORE_COLUMNS,
    image_column,
    labels_column,
    named_like,
    refuse_parts,
)
from cbsa_lightning.data.readers.separators import Form
from cbsa_lightning.data.readers.source import tidy_paths
from cbsa_lightning.data.readers.words import NO_LABEL, Words
from cbsa_lightning.errors import ConfigError, DataError


@dataclass(frozen=True)
class TableForm:
    """Options of a table. Options that are not given are detected.

    Attributes:
        separator: Separator of the names in a cell.
        image_column: The column with the paths.
        labels_column: The column with class names.
        nothing: Words that mean that an image shows no class, in addition to ``none``.
        repeated: Rule for merging contradictory rows of an image; see ``merge_rows``.

    Raises:
        ConfigError: If an argument has the wrong type, the separator is empty, or a choice is invalid.
    """

    separator: str | None = None
    image_column: str | None = None
    labels_column: str | None = None
    nothing: Sequence[str] = ()
    repeated: Repeated = "stop"

    def __post_init__(self) -> None:
        for name in ("separator", "image_column", "labels_column"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"Table: {name} must be a nonempty string, got {value!r:.100}.")
        if self.nothing not in ((), []):
            check_names("Table: nothing", self.nothing)
        check_choice("Table: repeated", self.repeated, CHOICES)


_ANY_FORM = TableForm()


def find_classes(path: str | Path, form: TableForm = _ANY_FORM) -> ClassFile:
    """Returns the classes of a table, which are the sorted names of its labels or its class columns in order.

    Raises:
        DataError: If there are no classes, or two classes have the same prompt text.
    """
    return _classes_in(read_columns(path), form)


def _classes_in(columns: Columns, form: TableForm) -> ClassFile:
    image = image_column(columns, form.image_column)
    column = labels_column(columns, image, form.labels_column)
    if column is None:
        refuse_parts(columns, {image})
        found, place = class_columns(columns, image, _words(form)), f"{columns.path}, columns"
    else:
        found = NamedLabels(columns, column, _words(form), _cells(form), None).class_names()
        place = f"{columns.path}, column {column!r}"
    names = check_class_names(found, place)
    return ClassFile(columns.path, names, check_prompt_names(names, default_prompts(names), place), {})


def read_table(
    path: str | Path,
    classes: ClassFile | None = None,
    *,
    form: TableForm = _ANY_FORM,
    root: str | Path | None = None,
    allow_outside: bool = False,
    other_columns: bool = True,
    notes: list[str] | None = None,
) -> AnnotationTable:
    """Reads a table. See ``Table`` for its form.

    Args:
        path: CSV, Parquet or JSON lines file.
        classes: The classes to read. Defaults to those of the table.
        form: Options of the table.
        root: Folder that paths are relative to. Defaults to the folder that contains the table.
        allow_outside: Whether paths may be outside ``root``.
        other_columns: Whether columns other than classes are allowed in a table with one column per class.
        notes: List to which notes on what was detected are appended.

    Raises:
        DataError: If there is no image column or no label, rows of an image contradict each other, a path is empty or
            outside ``root``, a class is unknown, a cell is not a label or is ambiguous, or a column divides the images
            into splits. The message names the row.
    """
    columns = read_columns(path)
    given = classes is not None
    classes = classes or _classes_in(columns, form)
    image = image_column(columns, form.image_column)
    root = columns.path.parent if root is None else Path(root)
    paths = tidy_paths(root, root, columns.text(image).fill_null(""), columns.where, allow_outside)
    known = classes.index()
    in_file = known if given and other_columns else ()  # these are classes, even if they are called "label" or "split"
    words = _words(form, known)
    column = labels_column(columns, image, form.labels_column, in_file)
    one_label_a_row = False
    if column is None:
        refuse_parts(columns, {image, *in_file})
        labels = labels_by_column(columns, image, classes, words, other_columns)
        how = "labels by column, one column per class"
    else:
        refuse_parts(columns, {image, column, *known})
        if NO_LABEL in known:
            raise DataError(
                f"{classes.path}: a class cannot be called {NO_LABEL!r}, which means that an image shows no class in "
                f"column {column!r}; rename it, or use one column per class"
            )
        named = NamedLabels(columns, column, words, _cells(form), known)
        labels = named.matrix(classes)
        how = f"labels by name in column {column!r}, {named.labels.form}"
        if named.reviewed is not None:
            how += "; classes in column 'review' are unknown"
        judged = named_like(columns, (*ANNOTATOR_COLUMNS, *SCORE_COLUMNS))
        one_label_a_row = named.most_names_in_a_row() <= 1 and not judged
    merged = merge_rows(columns, paths, labels, classes.class_names, form.repeated, one_label_a_row)
    if notes is not None:
        notes.append(f"{path}: {len(merged.kept):,} images in column {image!r}; {how}")
        notes += [f"{path}: {merged.note}"] if merged.note else []
    return AnnotationTable(root, paths[merged.kept], merged.labels, classes.class_names, classes.prompt_names)


def _words(form: TableForm, classes: dict[str, int] | None = None) -> Words:
    return Words(frozenset(map(clean_name, form.nothing)), classes or ())


def _cells(form: TableForm) -> Form | None:
    return None if form.separator is None else Form(form.separator)
