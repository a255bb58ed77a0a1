"""The one in-memory form of annotations: columns, not objects, so that a million images are two arrays."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
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
from cbsa_lightning.errors import DataError, listed

__all__ = ["AnnotationTable", "ClassFile", "read_class_file"]

StringArray = NDArray[Any]  # of np.dtypes.StringDType(), for which numpy has no usable type parameter yet
POSITIVE, NEGATIVE, UNKNOWN = 1, 0, -1


@dataclass(frozen=True, eq=False)
class AnnotationTable:
    """Images and their labels, as columns.

    Attributes:
        root: Folder that ``paths`` are relative to.
        paths: (n,) strings, "/" between folders, relative to ``root``; an absolute path is a file outside it.
        labels: (n, C) int8: 1 present, 0 absent, -1 unknown.
        class_names: C names as in the annotation files.
        prompt_names: C names as put in prompts; left empty, the class names with "_" as a space.

    Raises:
        DataError: Wrong shape, another label value, the same path twice, an empty path, class names that are
            empty or equal (after Unicode NFC and strip), or two classes with the same prompt text.
    """

    root: Path
    paths: StringArray
    labels: NDArray[np.int8]
    class_names: tuple[str, ...]
    prompt_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = check_class_names(self.class_names, "annotation table")
        prompts = check_prompt_names(names, self.prompt_names or default_prompts(names), "annotation table")
        paths = np.asarray(self.paths, dtype=np.dtypes.StringDType())
        if paths.ndim != 1:
            raise DataError(f"annotation table: paths have shape {paths.shape}; expected (n,)")
        labels = _as_labels(self.labels, len(paths), names)
        texts = paths.tolist()
        if "" in texts:
            raise DataError(f"annotation table: row {texts.index('')} has an empty path")
        if pairs := duplicates(texts):
            found = listed(f"{texts[i]!r} (rows {i} and {j})" for i, j in pairs)
            raise DataError(f"annotation table: the same path twice: {found}; keep one row an image")
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
        """Full path of the image of row ``i``."""
        return self.root / str(self.paths[i])

    def select(self, indices: ArrayLike) -> AnnotationTable:
        """The rows ``indices``, in that order; a row cannot be taken twice."""
        rows = np.asarray(indices)
        if rows.size == 0:
            rows = rows.astype(np.int64)  # an empty list is float64 to numpy, which cannot index
        return AnnotationTable(self.root, self.paths[rows], self.labels[rows], self.class_names, self.prompt_names)

    def digest(self) -> str:
        """Sha256 over class names, paths and labels: the same on every machine, whatever ``root`` is."""
        sha = hashlib.sha256()
        for part in (self.class_names, self.paths.tolist()):
            sha.update(json.dumps(part, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        sha.update(np.ascontiguousarray(self.labels).tobytes())
        return sha.hexdigest()

    def missing_files(self) -> list[str]:
        """Images that are not files, each as "path (row i)", rows counted from 0.

        Every folder is listed once instead of asking for each file: quick on network disks too.
        """
        by_folder: dict[str, list[tuple[str, int]]] = {}
        for row, path in enumerate(self.paths.tolist()):
            folder, slash, name = path.rpartition("/")
            by_folder.setdefault(folder + slash, []).append((name, row))
        missing = []
        for folder, members in by_folder.items():
            here = os.path.join(self.root, folder)
            present = _file_names(here)
            # Asking once more lets a file system that ignores case find what its listing spells otherwise.
            missing += [
                row for name, row in members if name not in present and not os.path.isfile(os.path.join(here, name))
            ]
        return [f"{self.paths[row]} (row {row})" for row in sorted(missing)]

    def require_files(self) -> None:
        """Checks that every image is there.

        Raises:
            DataError: Some are not; the first 20 are named.
        """
        if missing := self.missing_files():
            raise DataError(
                f"{len(missing)} of {len(self)} images are not under {self.root}: {listed(missing)}; "
                "put the files there, correct the root, or take their rows out of the annotations"
            )


def _as_labels(labels: ArrayLike, num_rows: int, class_names: tuple[str, ...]) -> NDArray[np.int8]:
    array = np.asarray(labels)
    expected = (num_rows, len(class_names))
    if array.shape != expected:
        raise DataError(f"annotation table: labels have shape {array.shape}; expected (n, C) = {expected}")
    if array.dtype == np.int8 and (not array.size or (array.min() >= -1 and array.max() <= 1)):
        return array
    # Values are judged before the cast: 256 would become 0 in int8.
    wrong = np.argwhere(~np.isin(array, (POSITIVE, NEGATIVE, UNKNOWN)))
    if len(wrong):
        found = listed(f"{array[i, k]} (row {i}, class {class_names[k]!r})" for i, k in wrong)
        raise DataError(f"annotation table: labels must be 1 (present), 0 (absent) or -1 (unknown); found {found}")
    return array.astype(np.int8)


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()
