"""Functions that read JSON, JSON lines and XML files from labeling tools and check the types of their fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cbsa_lightning.data.readers.source import read_lines
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text

_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_KINDS |= {list: "a list", dict: "an object", type(None): "null"}
_REQUIRED = object()


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        DataError: If the file is missing, is not JSON, or has a repeated key in an object.
    """
    return parse_json(_text(file), str(file))


def read_json_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the objects of a file with one JSON object per line, and their locations. Skips empty lines.

    Raises:
        DataError: If the file is missing or empty, or a line is not a JSON object.
    """
    records = []
    for number, line in enumerate(read_lines(file, "correct the path, or save the file as UTF-8"), start=1):
        where = f"{file}, line {number}"
        if line.strip():
            records.append((where, typed(parse_json(line, where), (dict,), where)))
    if not records:
        raise DataError(f"{file}: the file is empty; export it again")
    return records


def parse_json(text: str, where: str) -> Any:
    """Parses a JSON text.

    Raises:
        DataError: If the text is not JSON, or has a repeated key in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "it does not fit into memory"
        raise DataError(f"{where}: cannot be read as JSON ({reason}); export the file again") from error


def read_xml(file: Path) -> ElementTree.Element:
    """Returns the root element of an XML file; see :func:`parse_xml`.

    Raises:
        DataError: If the file is missing or cannot be parsed.
    """
    return parse_xml(_text(file), file)


def parse_xml(text: str, file: Path) -> ElementTree.Element:
    """Returns the root element of an XML text. To prevent entity expansion, document types are rejected.

    Args:
        text: The XML text.
        file: The file that contains the text, for error messages.

    Raises:
        DataError: If the text is not XML, or declares a document type.
    """
    if "\0" in text:  # the next check would not detect a declaration in UTF-16
        raise DataError(f"{file}: the file contains NUL characters, so it may be UTF-16; save it as UTF-8")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(
            f"{file}: the file declares a document type, which labeling tools never do; remove the declaration"
        )
    try:
        return ElementTree.fromstring(text)  # noqa: S314 (no entities, see above)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: the file is not XML ({error}); export it again") from error


def field(record: dict[str, Any], key: str, kinds: tuple[type, ...], where: str, default: Any = _REQUIRED) -> Any:
    """Returns a value of a JSON object after checking its type. True is not accepted as an integer.

    Args:
        record: The object.
        key: The key of the value.
        kinds: Allowed types.
        where: File and location, for error messages.
        default: Value if the key is missing. Without a default, a missing key is an error.

    Raises:
        DataError: If the key is missing, or its value has the wrong type.
    """
    if key not in record:
        if default is _REQUIRED:
            raise DataError(f"{where}: the key {key!r} is missing; export the file again, or add the key")
        return default
    return typed(record[key], kinds, f"{where}: {key}")


def typed(value: Any, kinds: tuple[type, ...], where: str) -> Any:
    """Returns ``value`` after checking that its type is one of ``kinds``.

    Raises:
        DataError: If ``value`` has the wrong type.
    """
    if type(value) not in kinds:
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise DataError(f"{where} must be {wanted}, found {brief(value)}; export the file again, or correct the value")
    return value


def counted(number: int, noun: str) -> str:
    """Formats a number with a noun for a note, as in "1 task" or "1,200 tasks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); correct the path, or save the file as UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for k, key in enumerate(keys) if key in keys[:k])
        raise ValueError(f"the key {brief(twice)} occurs twice in one object, so its value is ambiguous")
    return record
