"""Files with one JSON object a line as Arrow tables of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text

SUFFIXES = (".jsonl", ".ndjson", ".json")
_PEEK = 1 << 16  # bytes of the first line that are looked at in a file with another suffix


def is_json_lines(path: Path, file: BinaryIO) -> bool:
    """Whether a file is to be read as JSON lines: by its suffix, or since its first line is a JSON object."""
    if path.suffix.lower() in SUFFIXES:
        return True
    line = file.readline(_PEEK)
    file.seek(0)
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(path: Path) -> Any:
    """Reads one object a line; empty lines are passed over and do not count as rows.

    The columns are all keys, in the order in which they are met. A text stays as it is; any other value becomes its
    JSON text, such as ``["cat", "dog"]``, ``1.0`` or ``true``; ``null`` and a missing key become null.

    Returns:
        A table whose columns are text.

    Raises:
        DataError: The file is empty, too large for memory, or not UTF-8; a line is no JSON object or has a key twice.
    """
    try:
        lines = read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
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
        raise DataError(f"{path}: has no header and no JSON object; write one object a line, a line an image")
    try:
        return pa.table({key: pa.array(column, pa.large_string()) for key, column in columns.items()})
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: has half a character, a lone surrogate ({error}); correct it") from error


def _object(line: str, where: str) -> dict[str, str | None]:
    """Keys of one line, and their values as text."""
    try:
        pairs = json.loads(line, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {brief(line)} is no JSON object ({error}); write one object a line (pandas: "
            "to_json(orient='records', lines=True))"
        ) from error
    if not isinstance(pairs, _Pairs):
        raise DataError(
            f"{where}: {brief(line)} is JSON but no object; write one object a line (pandas: "
            "to_json(orient='records', lines=True))"
        )
    keys = [key for key, _ in pairs]
    if twice := [key for k, key in enumerate(keys) if key in keys[:k]]:
        raise DataError(f"{where}: the key {brief(twice[0])} stands twice, and only one of them can count; keep one")
    return {key: _text(value) for key, value in pairs}


class _Pairs(list[tuple[str, Any]]):
    """An object as it was written, so that a key that stands there twice is seen."""


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
