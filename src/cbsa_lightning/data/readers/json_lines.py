"""Reading of files with one JSON object per line as Arrow tables of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text

SUFFIXES = (".jsonl", ".ndjson", ".json")
_PEEK = 1 << 16  # maximum number of bytes to inspect in a file with another suffix


def is_json_lines(path: Path, file: BinaryIO) -> bool:
    """Returns whether a file has a suffix of JSON lines files, or a JSON object in its first line."""
    if path.suffix.lower() in SUFFIXES:
        return True
    line = file.readline(_PEEK)
    file.seek(0)
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(path: Path) -> Any:
    """Reads a file with one object per line. Empty lines are skipped and not counted as rows.

    The columns are all keys, in the order of their first occurrence. Strings are kept. Other values are converted to
    JSON text, such as ``["cat", "dog"]``, ``1.0`` or ``true``. ``null`` and missing keys become null.

    Returns:
        A table whose columns are text.

    Raises:
        DataError: If the file is empty, too large for memory, or not UTF-8, or a line is not a JSON object or has a
            repeated key.
    """
    try:
        lines = read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error}); save it as UTF-8") from error
    columns: dict[str, list[str | None]] = {}
    number = 0
    for line in lines:
        if not line.strip():
            continue
        number += 1
        for key, value in _object(line, f"{path}, row {number}").items():
            column = columns.setdefault(key, [])
            column += [None] * (number - 1 - len(column))
            column.append(value)
    for column in columns.values():
        column += [None] * (number - len(column))
    if not columns:
        raise DataError(
            f"{path}: the file has neither a header nor a JSON object; write one object per line and one line per image"
        )
    try:
        return pa.table({key: pa.array(column, pa.large_string()) for key, column in columns.items()})
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}: the file contains a lone surrogate, half a character ({error}); correct it"
        ) from error


def _object(line: str, where: str) -> dict[str, str | None]:
    """Returns the keys of a line, with their values as text."""
    try:
        pairs = json.loads(line, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {brief(line)} is not a JSON object ({error}); write one object per line (pandas: "
            "to_json(orient='records', lines=True))"
        ) from error
    if not isinstance(pairs, _Pairs):
        raise DataError(
            f"{where}: {brief(line)} is JSON but not an object; write one object per line (pandas: "
            "to_json(orient='records', lines=True))"
        )
    keys = [key for key, _ in pairs]
    if twice := [key for k, key in enumerate(keys) if key in keys[:k]]:
        raise DataError(f"{where}: the key {brief(twice[0])} occurs twice, so its value is ambiguous; keep one")
    return {key: _text(value) for key, value in pairs}


class _Pairs(list[tuple[str, Any]]):
    """An object that is stored as a list of pairs, so that repeated keys can be detected."""


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
