"""Images to predict: a folder, one image, or a list of paths; nothing is known of their labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable, StringArray, as_strings
from cbsa_lightning.data.readers.columns import Columns, read_columns, refuse_repeated_rows
from cbsa_lightning.data.readers.source import read_lines, tidy_paths
from cbsa_lightning.errors import DataError, listed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_images(
    path: str | Path,
    class_names: Sequence[str],
    prompt_names: Sequence[str] = (),
    *,
    root: str | Path | None = None,
    allow_outside: bool = False,
) -> AnnotationTable:
    """Lists images whose labels are all unknown.

    Args:
        path: A folder, searched with its sub-folders (names that start with "." are passed over), in sorted
            order; or one image; or a ".txt" file with one path a line; or a CSV or Parquet table, of
            which only the image column is read.
        class_names: The C classes to predict.
        prompt_names: C prompt names; empty for the default.
        root: Folder that the paths of a list are relative to; default: the folder of the list.
        allow_outside: Whether the paths of a list may leave ``root``.

    Returns:
        A table with label -1 everywhere.

    Raises:
        DataError: There is nothing at ``path``, or no image; a path is empty, repeated, or leaves ``root``.
    """
    path = Path(path)
    if path.is_dir():
        root, paths = path, as_strings(_images_below(path))
    elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        root, paths = path.parent, as_strings([path.name])
    else:
        root = path.parent if root is None else Path(root)
        paths = _listed_images(path, root, allow_outside)
    labels = np.full((len(paths), len(class_names)), UNKNOWN, dtype=np.int8)
    return AnnotationTable(root, paths, labels, tuple(class_names), tuple(prompt_names))


def _images_below(folder: Path) -> list[str]:
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [n for n in files if not n.startswith(".") and n.lower().endswith(IMAGE_SUFFIXES)]
        found += [Path(here, name).relative_to(folder).as_posix() for name in images]
    if not found:
        raise DataError(f"{folder}: no image in it or below; looked for {listed(IMAGE_SUFFIXES)}")
    return sorted(found)


def _listed_images(path: Path, root: Path, allow_outside: bool) -> StringArray:
    if path.suffix.lower() == ".txt":
        lines = read_lines(path, "give a folder, an image, a list (.txt) or a table (CSV, Parquet)")
        columns = Columns(path, None, 1)
        names = [line.strip() for line in lines]
        while names and not names[-1]:
            names.pop()
        if not names:
            raise DataError(f"{path}: names no image; write one path a line")
    else:
        columns = read_columns(path)
        names = columns.image_paths()
    tidy = tidy_paths(root, root, names, columns.where, allow_outside)
    refuse_repeated_rows(columns, tidy)
    return tidy
