"""JSON, JSON lines and XML files of labeling tools, and fields of the types that they must have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cbsa_lightning.data.readers.source import read_lines
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text

_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS |= {list: "a list", dict: "an object", type(None): "null"}
_REQUIRED = object()


def read_json(file: Path) -> Any:
    """Content of a JSON file.

    Raises:
        DataError: The file is missing, is no JSON, or has the same key twice in one object.
    """
    return parse_json(_text(file), str(file))


def read_json_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Objects of a file with one JSON object a line, each with its place for a message; empty lines are passed over.

    Raises:
        DataError: The file is missing or empty, or a line is no JSON object.
    """
    records = []
    for number, line in enumerate(read_lines(file, "correct the path, or save it as UTF-8"), start=1):
        where = f"{file}, line {number}"
        if line.strip():
            records.append((where, typed(parse_json(line, where), (dict,), where)))
    if not records:
        raise DataError(f"{file}: has no line; export it again")
    return records


def parse_json(text: str, where: str) -> Any:
    """Value of a JSON text.

    Raises:
        DataError: It is no JSON, or has the same key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "it does not fit into memory"
        raise DataError(f"{where}: cannot be read as JSON ({reason}); export it again") from error


def read_xml(file: Path) -> ElementTree.Element:
    """Root element of an XML file, as :func:`parse_xml` reads it.

    Raises:
        DataError: The file is missing, or is no such XML.
    """
    return parse_xml(_text(file), file)


def parse_xml(text: str, file: Path) -> ElementTree.Element:
    """Root element of an XML text. No entity is expanded: a text that declares a document type is refused.

    Args:
        text: The text.
        file: Its file, for messages.

    Raises:
        DataError: The text is no XML, or declares a document type.
    """
    if "\0" in text:  # the parser would take it for UTF-16, in which the next check sees no declaration
        raise DataError(f"{file}: has NUL characters, as UTF-16 read as UTF-8 has; save it as UTF-8")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{file}: declares a document type, which labeling tools never do; take the declaration out")
    try:
        return ElementTree.fromstring(text)  # noqa: S314 (no entities, see above)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: is no XML ({error}); export it again") from error


def field(record: dict[str, Any], key: str, kinds: tuple[type, ...], where: str, default: Any = _REQUIRED) -> Any:
    """A value of a JSON object, of one of the types ``kinds``; True is no whole number here.

    Args:
        record: The object.
        key: The key of the value.
        kinds: Types that it may have.
        where: File and place, for a message.
        default: What an absent key means; without it, an absent key is refused.

    Raises:
        DataError: The key is absent, or its value has another type.
    """
    if key not in record:
        if default is _REQUIRED:
            raise DataError(f"{where}: has no {key!r}; export the file again, or add it")
        return default
    return typed(record[key], kinds, f"{where}: {key}")


def typed(value: Any, kinds: tuple[type, ...], where: str) -> Any:
    """``value``, which must be of one of the types ``kinds``.

    Raises:
        DataError: It has another type.
    """
    if type(value) not in kinds:
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise DataError(f"{where} must be {wanted}, found {brief(value)}; export the file again, or correct it")
    return value


def counted(number: int, noun: str) -> str:
    """A number with its noun, for a note: "1 task", "1,200 tasks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); correct the path, or save it as UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for k, key in enumerate(keys) if key in keys[:k])
        raise ValueError(f"the key {brief(twice)} stands twice in one object, and only one of them can count")
    return record
