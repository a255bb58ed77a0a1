"""Annotations in memory, stored as columns instead of objects. A million images need only two arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbsa_lightning.data.class_names import (
    ClassFile,
    check_class_names,
    check_prompt_names,
    default_prompts,
    duplicates,
    read_class_file,
)
from cbsa_lightning.data.shards import names_in_shard
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

__all__ = ["AnnotationTable", "ClassFile", "read_class_file"]

StringArray = NDArray[Any]  # np.dtypes.StringDType(), for which numpy does not yet have a usable type parameter
POSITIVE, NEGATIVE, UNKNOWN = 1, 0, -1
_ROWS = 1 << 16  # maximum number of rows that are Python objects at the same time, to save memory


def as_strings(texts: Iterable[str] | NDArray[Any]) -> StringArray:
    """Converts ``texts`` to a string column. A string column is returned without copying."""
    dtype = np.dtypes.StringDType()
    if isinstance(texts, np.ndarray) and texts.dtype == dtype:
        return texts  # numpy would copy, since it treats two instances of StringDType as different types
    texts = texts if isinstance(texts, np.ndarray) else list(texts)
    try:
        return np.asarray(texts, dtype=dtype)
    except UnicodeEncodeError as error:
        row = first_not_unicode(texts)
        raise DataError(
            f"row {row} of an annotation table: the path {brief(texts[row])} is not valid Unicode. Tables cannot store "
            "file names that are not UTF-8; rename the file"
        ) from error


def first_not_unicode(texts: Iterable[Any]) -> int:
    """Returns the index of the first text with a lone surrogate, which represents a file name that is not UTF-8."""
    return next(i for i, text in enumerate(texts) if any("\ud800" <= mark <= "\udfff" for mark in str(text)))


def blocks(column: Any) -> Iterator[Any]:
    """Splits a numpy or Arrow array into blocks of consecutive rows."""
    return (column[start : start + _ROWS] for start in range(0, len(column), _ROWS))


def json_pieces(column: NDArray[Any]) -> Iterator[str]:
    """Yields ``json.dumps(column.tolist(), ensure_ascii=False)`` in pieces."""
    yield "["
    for i, block in enumerate(blocks(column)):
        yield (", " if i else "") + json.dumps(block.tolist(), ensure_ascii=False)[1:-1]
    yield "]"


def repeated_rows(paths: StringArray) -> list[tuple[int, int]]:
    """Returns pairs (first row, later row) of equal paths, like ``duplicates``, but supports millions of paths.

    Only rows with equal hashes are compared as text. This needs eight bytes per row, whereas a set of paths needs 150.
    """
    hashes = np.fromiter(map(hash, _texts(paths)), np.int64, len(paths))
    ordered = np.sort(hashes)
    rows = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))
    return [(int(rows[i]), int(rows[j])) for i, j in duplicates(paths[rows].tolist())]


@dataclass(frozen=True, eq=False)
class AnnotationTable:
    """Images and their labels, stored as columns.

    Attributes:
        root: Folder that ``paths`` are relative to.
        paths: (n,) strings relative to ``root``, with "/" between folders. Files outside ``root`` have absolute paths.
        labels: (n, C) int8: 1 present, 0 absent, -1 unknown.
        class_names: The C class names in the annotation files.
        prompt_names: The C class names to use in prompts. By default, "_" is replaced by a space in the class names.

    Raises:
        DataError: If a shape or label value is wrong, a path is empty or occurs twice, a class name is empty or occurs
            twice (after Unicode NFC and strip), or two classes have the same prompt text.
    """

    root: Path
    paths: StringArray
    labels: NDArray[np.int8]
    class_names: tuple[str, ...]
    prompt_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = check_class_names(self.class_names, "annotation table")
        prompts = check_prompt_names(names, self.prompt_names or default_prompts(names), "annotation table")
        paths = as_strings(self.paths)
        if paths.ndim != 1:
            raise DataError(f"annotation table: paths have shape {paths.shape}; expected (n,)")
        labels = _as_labels(self.labels, len(paths), names)
        if (empty := paths == "").any():
            raise DataError(f"annotation table: row {int(empty.argmax())} has an empty path")
        if pairs := repeated_rows(paths):
            found = listed(f"{brief(str(paths[i]))} (rows {i} and {j})" for i, j in pairs)
            raise DataError(f"annotation table: paths that occur twice: {found}; keep one row per image")
        for field, value in (
            ("root", Path(self.root)),
            ("paths", paths),
            ("labels", labels),
            ("class_names", names),
            ("prompt_names", prompts),
        ):
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    def file(self, i: int) -> Path:
        """Returns the full path of the image in row ``i``."""
        return self.root / str(self.paths[i])

    def select(self, indices: ArrayLike) -> AnnotationTable:
        """Returns a table of the rows ``indices``, in this order. A row cannot be selected twice."""
        rows = np.asarray(indices)
        if rows.size == 0:
            rows = rows.astype(np.int64)  # numpy converts an empty list to float64, which cannot be used as an index
        return AnnotationTable(self.root, self.paths[rows], self.labels[rows], self.class_names, self.prompt_names)

    def digest(self) -> str:
        """Returns the SHA-256 of class names, paths and labels. It does not depend on the machine or ``root``."""
        sha = hashlib.sha256()
        for piece in chain([json.dumps(self.class_names, ensure_ascii=False)], json_pieces(self.paths)):
            sha.update(piece.encode("utf-8", "surrogatepass"))
        for block in blocks(self.labels):
            sha.update(block.tobytes())
        return sha.hexdigest()

    def missing_rows(self) -> NDArray[np.int64]:
        """Returns the rows whose image files do not exist, in ascending order.

        To be fast on network disks, each folder is listed once instead of checking each file.
        """
        folders: dict[str, int] = {}
        numbers = (folders.setdefault(path[: path.rfind("/") + 1], len(folders)) for path in _texts(self.paths))
        folder_of = np.fromiter(numbers, np.int64, len(self))
        ends = np.cumsum(np.bincount(folder_of))
        members = np.split(np.argsort(folder_of, kind="stable"), ends[:-1])
        # The lengths can differ, since numpy splits an empty array into one empty part.
        missing = (
            row for folder, rows in zip(folders, members, strict=False) for row in self._missing_in(folder, rows)
        )
        return np.sort(np.fromiter(missing, np.int64))

    def missing_files(self) -> list[str]:
        """Returns the images of :meth:`missing_rows` as strings "path (row i)". Rows are counted from 0."""
        return [f"{self.paths[row]} (row {row})" for row in self.missing_rows().tolist()]

    def _missing_in(self, folder: str, rows: NDArray[np.int64]) -> Iterator[int]:
        """Yields the ``rows`` whose files are missing. All are in ``folder``, which is empty or ends with a slash."""
        here = os.path.join(self.root, folder)
        present = _file_names(here)
        for block in blocks(rows):
            for row, path in zip(block.tolist(), self.paths[block].tolist(), strict=True):
                name = path.removeprefix(folder)
                # On a case-insensitive file system, a file may exist although the listing spells its name differently.
                if name not in present and not os.path.isfile(os.path.join(here, name)):
                    yield row

    def require_files(self) -> None:
        """Checks that every image exists.

        Raises:
            DataError: If images are missing. The message names the first 20.
        """
        if missing := self.missing_files():
            raise DataError(
                f"{len(missing)} of {len(self)} images are not under {self.root}: {listed(missing)}; "
                "put the files there, correct the root, or remove their rows from the annotations"
            )

    def shared_files(self, other: AnnotationTable) -> list[str]:
        """Returns the full paths of the images of ``other`` that are also in this table, in the order of ``other``.

        The tables may have different roots, since full paths are compared.
        """
        fewer, more = sorted((self, other), key=len)
        shared = set(fewer._full_paths()).intersection(more._full_paths())
        return [str(other.file(i)) for i, path in enumerate(other._full_paths()) if path in shared] if shared else []

    def _full_paths(self) -> Iterator[str]:
        """Yields ``file(i).as_posix()`` of each row without creating Path objects."""
        prefix = (self.root / "x").as_posix()[:-1]
        for row, text in enumerate(_texts(self.paths)):
            slashed = f"/{text}/"
            # pathlib normalizes only such paths or treats them as absolute. It appends others to the root unchanged.
            odd = "//" in slashed or "/./" in slashed or "\\" in text or ":" in text
            yield self.file(row).as_posix() if odd else prefix + text


def _texts(paths: StringArray) -> Iterator[str]:
    """Yields ``paths`` as Python strings. Only one block of them is in memory at a time."""
    return chain.from_iterable(block.tolist() for block in blocks(paths))


def _as_labels(labels: ArrayLike, num_rows: int, class_names: tuple[str, ...]) -> NDArray[np.int8]:
    array = np.asarray(labels)
    expected = (num_rows, len(class_names))
    if array.shape != expected:
        raise DataError(f"annotation table: labels have shape {array.shape}; expected (n, C) = {expected}")
    if array.dtype == np.int8 and (not array.size or (array.min() >= -1 and array.max() <= 1)):
        return array
    # Values must be checked before the conversion to int8, which would turn 256 into 0.
    wrong = np.argwhere(~np.isin(array, (POSITIVE, NEGATIVE, UNKNOWN)))
    if len(wrong):
        found = listed(f"{array[i, k]} (row {i}, class {class_names[k]!r})" for i, k in wrong)
        raise DataError(f"annotation table: labels must be 1 (present), 0 (absent) or -1 (unknown); found {found}")
    return array.astype(np.int8)


def _file_names(folder: str) -> set[str]:
    if (names := names_in_shard(folder)) is not None:
        return names
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: an invalid file name
        return set()
