"""Parsing of files in COCO's "instances" format, in which each field is checked."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

from cbsa_lightning.data.class_names import check_class_names, duplicates
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, open_regular, read_text, refuse_larger_than_memory

_ID = (int, str)  # COCO's own files contain integers; other data sets use strings
_TYPES = {int: "an integer", str: "a string"}
_KEYS = {"images", "annotations", "categories", "id", "file_name", "name", "image_id", "category_id"}


class CocoFile(NamedTuple):
    """Content of a file.

    Attributes:
        class_names: Names of the categories, sorted by id.
        file_names: Mapping from image id to file name.
        pairs: Pair (image id, class index) of each annotation.
    """

    class_names: tuple[str, ...]
    file_names: dict[int | str, str]
    pairs: list[tuple[int | str, int]]


def read_coco_file(file: Path) -> CocoFile:
    """Reads and checks a file.

    Raises:
        DataError: If the file is missing, malformed or too large for memory; if there are no categories; if an image
            id, category id or category name occurs twice or has the wrong type; or if an annotation refers to an
            unknown image or category.
    """
    content = _load(file)
    position, class_names = _classes(content["categories"], file)
    found = _fields(content["images"], {"id": _ID, "file_name": (str,)}, file, "images")
    _refuse_twice([str(number) for number, _ in found], file, "images", "id")
    names = dict(found)
    _refuse_other_tasks(content["annotations"], file)
    pairs = _fields(content["annotations"], {"image_id": _ID, "category_id": (int,)}, file, "annotations")
    for i, (image, category) in enumerate(pairs):
        if image not in names or category not in position:
            what = f"image {brief(image)}" if image not in names else f"category {brief(category)}"
            raise DataError(f"{file}, annotations[{i}]: {what} is not in the file; {_remedy(image, names)}")
    return CocoFile(class_names, names, [(image, position[category]) for image, category in pairs])


def peek_class_names(file: Path) -> tuple[str, ...]:
    """Reads the class names without parsing the whole file, which has 330 MB for COCO train.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If the file is not a COCO file.
    """
    try:
        with open_regular(file) as stream:
            refuse_larger_than_memory(file, os.fstat(stream.fileno()).st_size)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = content.rfind(b'"categories"')
                tail = content[start:].decode("utf-8", "replace") if start >= 0 else ""
        categories, _ = json.JSONDecoder().raw_decode(tail.partition(":")[2].lstrip())
        return _classes(categories, file)[1]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError):  # inconclusive, so the whole file is read
        return _classes(_load(file)["categories"], file)[1]


def _load(file: Path) -> dict[str, Any]:
    try:
        # Outlines take up most of the file but are not needed. They are dropped during parsing to save memory.
        content = json.loads(read_text(file), object_pairs_hook=_without_outline)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; download the COCO annotations, or correct the path") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "it does not fit into memory"
        raise DataError(f"{file} cannot be read as JSON ({reason}); download it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file} has no list {key!r}; it must be a COCO instances file")
    return dict(content)


def _without_outline(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        if twice := [key for k, key in enumerate(keys) if key in _KEYS and key in keys[:k]]:
            raise ValueError(f"the key {twice[0]!r} occurs twice in one record, so its value is ambiguous")
    record.pop("segmentation", None)
    return record


def _refuse_other_tasks(annotations: list[Any], file: Path) -> None:
    for i, record in enumerate(annotations):
        if isinstance(record, dict) and "category_id" not in record and "caption" in record:
            raise DataError(
                f"{file}, annotations[{i}] has a caption but no category_id, as in a captions file; give the instances "
                "file of these images"
            )


def _remedy(image: int | str, names: dict[int | str, str]) -> str:
    """Returns the remedy for an unknown image id. Often, only its type is wrong."""
    alike = [] if image in names else [other for other in names if str(other) == str(image)]
    if alike:
        types = f"its image_id is {_TYPES[type(image)]}, the id of the image {_TYPES[type(alike[0])]}"
        return f"{types}; write both as text or both as integers"
    return "correct or remove it"


def _fields(records: list[Any], kinds: dict[str, tuple[type, ...]], file: Path, kind: str) -> list[tuple[Any, Any]]:
    """Checks the types of two fields of each record and returns the fields. True is not accepted as a number."""
    (first, first_types), (second, second_types) = kinds.items()
    try:
        pairs = [(record[first], record[second]) for record in records]
    except (KeyError, TypeError, IndexError):
        pairs = []
    if len(pairs) == len(records) and all(type(a) in first_types and type(b) in second_types for a, b in pairs):
        return pairs
    for i, record in enumerate(records):
        absent = [key for key in kinds if not isinstance(record, dict) or key not in record]
        if absent:
            raise DataError(f"{file}, {kind}[{i}] has no {listed(absent)}; add it")
        for key, types in kinds.items():
            if type(record[key]) not in types:
                wanted = " or ".join(_TYPES[t] for t in types)
                raise DataError(f"{file}, {kind}[{i}]: {key} must be {wanted}, found {brief(record[key])}; correct it")
    raise AssertionError("one of the records is invalid")


def _classes(categories: list[Any], file: Path) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Returns a mapping from category id to class index, and the class names sorted by id."""
    if not categories:
        raise DataError(f"{file}: categories is empty; add an id and a name for each class")
    pairs = _fields(categories, {"id": (int,), "name": (str,)}, file, "categories")
    _refuse_twice([str(number) for number, _ in pairs], file, "categories", "id")
    _refuse_twice([name for _, name in pairs], file, "categories", "name")
    pairs.sort()
    return {number: k for k, (number, _) in enumerate(pairs)}, check_class_names(
        [name for _, name in pairs], f"{file}, categories"
    )


def _refuse_twice(values: list[str], file: Path, kind: str, what: str) -> None:
    if pairs := duplicates(values):
        found = listed(f"{brief(values[i])} ({kind}[{i}] and {kind}[{j}])" for i, j in pairs)
        raise DataError(f"{file}: {what}s that occur twice: {found}; keep one of each")
