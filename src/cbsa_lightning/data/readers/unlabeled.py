"""Unlabeled images to predict, given as a folder, an image, or a list of paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable, StringArray, as_strings, first_not_unicode
from cbsa_lightning.data.images import foreign_kind
from cbsa_lightning.data.readers.columns import Columns, read_columns, refuse_repeated_rows
from cbsa_lightning.data.readers.roles import image_column
from cbsa_lightning.data.readers.source import read_lines, tidy_paths
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

# Suffixes of the supported image formats.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".j2k", ".mpo", ".avif",
)  # fmt: skip


def read_images(
    path: str | Path,
    class_names: Sequence[str],
    prompt_names: Sequence[str] = (),
    *,
    root: str | Path | None = None,
    allow_outside: bool = False,
) -> AnnotationTable:
    """Returns a table of images without labels.

    Args:
        path: A folder, an image, a ".txt" file with one path per line, or a CSV or Parquet table, of which only the
            image column is read. A folder is searched in sorted order, including subfolders and linked folders. Names
            that start with "." are skipped.
        class_names: The C classes to predict.
        prompt_names: The C prompt names, or empty for the default names.
        root: Folder that the paths in a list are relative to. Defaults to the folder that contains the list.
        allow_outside: Whether the paths in a list may be outside ``root``.

    Returns:
        A table in which all labels are -1.

    Raises:
        DataError: If ``path`` does not exist or contains no images; if a folder cannot be listed or is linked into
            itself; or if a path is empty, repeated, outside ``root`` or not UTF-8.
    """
    path = Path(path)
    if os.path.isdir(path):
        root, paths = path, as_strings(_images_below(path))
    elif os.path.isfile(path) and path.suffix.lower() not in IMAGE_SUFFIXES and (kind := foreign_kind(path)):
        raise DataError(f"{path}: {kind} files are not supported; convert the file to JPEG or PNG")
    elif path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path):
        root, paths = path.parent, as_strings([path.name])
    else:
        root = path.parent if root is None else Path(root)
        paths = _listed_images(path, root, allow_outside)
    labels = np.full((len(paths), len(class_names)), UNKNOWN, dtype=np.int8)
    return AnnotationTable(root, paths, labels, tuple(class_names), tuple(prompt_names))


def left_out(path: str | Path) -> list[str]:
    """Returns the files in a folder that :func:`read_images` omits because of their suffix, or none for a list."""
    if not os.path.isdir(path):
        return []
    return sorted(name for name in _walk(os.fspath(path)) if not _is_image(name))


def by_suffix(names: Iterable[str]) -> str:
    """Counts files by suffix for a message, as in "2 .heic, 1 without a suffix"."""
    counts = Counter(Path(name).suffix.lower() or "without a suffix" for name in names)
    return listed(f"{count} {suffix}" for suffix, count in counts.most_common())


def _images_below(folder: Path) -> list[str]:
    names = list(_walk(os.fspath(folder)))
    found = sorted(filter(_is_image, names))
    if not found:
        there = f"it contains only {by_suffix(names)}" if names else "it is empty"
        raise DataError(
            f"{folder}: there is no image in this folder or its subfolders, {there}; expected {listed(IMAGE_SUFFIXES)}"
        )
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        name = found[first_not_unicode(found)]
        raise DataError(
            f"{folder}: the name {brief(os.fsencode(name))} is not UTF-8, so it cannot be stored in a "
            "table; rename the file"
        ) from error
    return found


def _walk(root: str) -> Iterator[str]:
    """Yields files in ``root`` and its subfolders, relative to ``root``. Each folder may be reached in only one way.

    Links are followed, since their images would silently be missing otherwise. A cycle of links reaches a folder twice.
    """
    reached: dict[tuple[int, int], str] = {}
    folders = [""]
    while folders:
        below = folders.pop()
        here = os.path.join(root, below)
        try:
            status = os.stat(here)
            first = reached.setdefault((status.st_dev, status.st_ino), here)
            if first is not here:
                raise DataError(
                    f"{here}: this is a link to the folder {first}, whose images would be counted twice; remove "
                    "the link"
                )
            with os.scandir(here) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(
                f"{here}: the folder cannot be listed ({error.strerror}); change its permissions, or move it"
            ) from error
        for entry in visible:
            name = f"{below}/{entry.name}" if below else entry.name
            if _is_folder(entry):
                folders.append(name)
            else:
                yield name


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise DataError(f"{entry.path}: the link cannot be followed ({error.strerror}); remove it") from error


def _listed_images(path: Path, root: Path, allow_outside: bool) -> StringArray:
    if path.suffix.lower() == ".txt":
        lines = read_lines(path, "give a folder, an image, a list (.txt) or a table (CSV, Parquet)")
        columns = Columns(path, None, 1)
        names = [line.strip() for line in lines]
        while names and not names[-1]:
            names.pop()
        if not names:
            raise DataError(f"{path}: the file contains no paths; write one path per line")
    else:
        columns = read_columns(path)
        names = columns.text(image_column(columns)).fill_null("")
    tidy = tidy_paths(root, root, names, columns.where, allow_outside)
    refuse_repeated_rows(columns, tidy)
    return tidy
