"""Reading of exports of Label Studio with one row per answer (JSON_MIN, CSV and TSV)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbsa_lightning.data.class_names import did_you_mean
from cbsa_lightning.data.readers.columns import read_columns
from cbsa_lightning.data.readers.label_studio_tasks import Task, image_of
from cbsa_lightning.data.readers.structured import counted, field, parse_json, typed
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

_OWN = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "path"}  # keys that every row has
_ID = re.compile(r"([0-9]+)(\.0)?", re.ASCII)
_SEVERAL = '{"choices"'  # beginning of a cell with several choices or no choice


def read_json_min(
    file: Path, rows: list[dict[str, Any]], control: str | None, key: str
) -> tuple[list[Task], list[str]]:
    """Reads JSON_MIN.

    If the key of the control is missing, the annotator chose nothing. If ``annotation_id`` is null, there is no answer.

    Args:
        file: The export, for error messages.
        rows: The rows of the export.
        control: Name of the control with the choices. None uses the only key that has several choices.
        key: Key of the image.

    Returns:
        One task per row, and notes on other content of the file.

    Raises:
        DataError: If a field is missing or has the wrong type, or the control is ambiguous.
    """
    return _read(file, rows, control, key, lambda i: f"{file}, record {i + 1}")


def read_csv(file: Path, control: str | None, key: str) -> tuple[list[Task], list[str]]:
    """Reads CSV or TSV, in which only ``annotation_id`` distinguishes an empty answer from a missing one.

    The arguments, results and errors are those of :func:`read_json_min`.
    """
    columns = read_columns(file)
    if "annotation_id" not in columns.names:
        raise DataError(
            f"{file}: the file has no column named 'annotation_id', which distinguishes empty answers from unlabeled "
            "images; export as JSON"
        )
    cells = {name: columns.text(name).fill_null("").to_pylist() for name in columns.names}
    rows = []
    for i in range(columns.table.num_rows):
        row: dict[str, Any] = {name: column[i] for name, column in cells.items() if column[i]}
        if key in cells:
            row[key] = cells[key][i]
        row["annotation_id"] = _number(cells["annotation_id"][i], columns.where(i))
        for name, cell in row.items():
            if name != key and isinstance(cell, str) and cell.startswith(_SEVERAL):
                row[name] = parse_json(cell, f"{columns.where(i)}, column {brief(name)}")
        rows.append(row)
    return _read(file, rows, control, key, columns.where)


def _number(cell: str, where: str) -> int | None:
    """Parses the ``annotation_id`` in a cell. If some cells of the column are empty, pandas writes 3.0 for 3."""
    if not cell:
        return None
    found = _ID.fullmatch(cell)
    if found is None or len(cell) > 20:
        raise DataError(f"{where}: annotation_id must be an integer or empty, found {brief(cell)}; correct it")
    return int(found[1])


def _read(
    file: Path, rows: list[dict[str, Any]], control: str | None, key: str, where: Callable[[int], str]
) -> tuple[list[Task], list[str]]:
    control = _control(file, rows, control)
    tasks = []
    for i, row in enumerate(rows):
        image, path = image_of(row, key, where(i))
        answered = field(row, "annotation_id", (int, type(None)), where(i)) is not None
        if not answered and row.get(control) not in (None, "", {}, {"choices": []}):
            raise DataError(
                f"{where(i)}: the row has {control!r} but no annotation_id; export as JSON, which marks drafts"
            )
        tasks.append(Task(where(i), image, path, [_chosen(row, control, where(i))] if answered else []))
    notes = []
    if count := sum(not task.answers for task in tasks):
        notes.append(f"{counted(count, 'task')} without an answer: unlabeled")
    if other := sorted({name for row in rows for name in row} - _OWN - {key, control}):
        notes.append(f"{counted(len(other), 'column')} not read: {listed(map(brief, other))}")
    return tasks, notes


def _control(file: Path, rows: list[dict[str, Any]], control: str | None) -> str:
    """Returns the name of the control with the choices."""
    several = {name: None for row in rows for name, value in row.items() if _is_several(value)}
    if control is None:
        if len(several) != 1:
            found = f"several do: {listed(map(brief, several))}" if several else "no row has several choices"
            raise DataError(
                f"{file}: it is ambiguous which column contains the choices ({found}); set control, or give "
                "label_config"
            )
        return next(iter(several))
    names = dict.fromkeys(name for row in rows for name in row)
    if control not in names and any(row.get("annotation_id") is not None for row in rows):
        raise DataError(
            f"{file}: no row has a column named {brief(control)}{did_you_mean(control, names)}; its columns are "
            f"{listed(map(brief, names))}; correct control, or export as JSON"
        )
    return control


def _is_several(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"choices"}


def _chosen(row: dict[str, Any], control: str, where: str) -> list[str]:
    """Returns the choices of an answer: a string, {"choices": [...]}, or nothing if there are none."""
    value = field(row, control, (str, dict), where, {"choices": []})
    if isinstance(value, str):
        return [value]
    if not _is_several(value):
        raise DataError(
            f"{where}: {control} must be a choice or {{'choices': [...]}}, found {brief(value)}; export as JSON"
        )
    choices: list[str] = field(value, "choices", (list,), where)
    for choice in choices:
        typed(choice, (str,), f"{where}: a choice")
    return choices
