"""Interface of the data sources, and functions that several readers use."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cbsa_lightning.data.annotations import AnnotationTable, StringArray, blocks, first_not_unicode, repeated_rows
from cbsa_lightning.data.class_names import ClassFile
from cbsa_lightning.data.shards import shard_files
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, read_text


class Source(ABC):
    """A data set, with its classes and with tables of images and labels for training and testing."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C class names in the annotation files. This is fast, since no images are read."""
        raise NotImplementedError

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The C class names to use in prompts."""
        raise NotImplementedError

    @abstractmethod
    def prepare(self) -> None:
        """Downloads or generates files, or checks that they exist. Called in one process before the files are read.

        Raises:
            DataError: If files are missing. The message states what to download and where to put it.
        """

    @abstractmethod
    def train(self) -> AnnotationTable:
        """Returns the training images."""

    @abstractmethod
    def test(self) -> AnnotationTable | None:
        """Returns the test images, or None if there are none."""

    def test_under(self, classes: ClassFile) -> AnnotationTable | None:
        """Returns the test images for the classes of a checkpoint, without reading the training annotations.

        Sources that derive their classes from the training annotations override this method.

        Args:
            classes: The classes of the checkpoint.

        Raises:
            DataError: If the annotations cannot be used, or have other classes.
        """
        return self.test()

    def describe(self) -> list[str]:
        """Returns notes for the user on what was detected in the annotation files. This may read the files."""
        return []


def require_named(named: Iterable[tuple[str, str | None]]) -> None:
    """Checks that the files in (argument, path) pairs exist. A path of None is ignored.

    Raises:
        DataError: If a file does not exist. The message names its path and argument.
    """
    named = list(named)
    if missing := [f"{path} ({what})" for what, path in named if path is not None and not _exists(path)]:
        if folders := [f"{path} ({what})" for what, path in named if path is not None and os.path.isdir(path)]:
            raise DataError(
                f"{listed(folders)} is a folder; specify a table with one row per image (docs/reference/data.md)"
            )
        raise DataError(f"no file at {listed(missing)}; add the file or correct the path")


def _exists(path: str) -> bool:
    return any(map(os.path.isfile, shard_files(path)))


def read_lines(file: Path, remedy: str) -> list[str]:
    """Returns the lines of a text file without line breaks.

    Raises:
        DataError: If the file is missing or is not UTF-8 text. The message ends with ``remedy``.
    """
    try:
        text = read_text(file).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); {remedy}") from error
    # splitlines is not used, since it also splits at a form feed or U+2028, which names may contain.
    return text.removesuffix("\n").split("\n") if text else []


# Paths that must be checked: empty, absolute, or with a drive, "\\", "//", ".", "..", a trailing "/", or a NUL.
ODD_PATH = r"^$|^/|^[A-Za-z]:|\\|//|(^|/)\.{1,2}(/|$)|/$|\x00"


def tidy_paths(
    root: str | Path,
    folder: str | Path,
    paths: Sequence[str] | pa.LargeStringArray,
    where: Callable[[int], str],
    allow_outside: bool = False,
) -> StringArray:
    """Normalizes image paths for a table. They become relative to ``root``, with "/" and without "." or "..".

    Only the text of a path is checked. Links on disk are not followed.

    Args:
        root: Folder that the paths in the table are relative to.
        folder: Folder that ``paths`` are relative to. It is usually ``root`` or a folder inside it.
        paths: The n paths in the annotations, with slashes or backslashes. None of them is null.
        where: Function that describes the file and the row of a path, for error messages.
        allow_outside: Whether paths may be outside ``root``. Such paths are stored as absolute paths.

    Returns:
        The normalized paths, (n,) strings.

    Raises:
        DataError: If a path is empty, is not a file below ``root``, is outside it without ``allow_outside``, or is not
            a valid file name.
    """
    base, start = os.path.abspath(root), os.path.abspath(folder)
    ahead = _relative(start, base)
    try:
        texts = pa.array(paths, pa.large_string())
    except UnicodeEncodeError as error:
        i = first_not_unicode(paths)
        raise DataError(
            f"{where(i)}: {brief(paths[i])} is not valid Unicode ({error.reason}); correct the path"
        ) from error
    tidy = _strings(texts)
    if ahead:
        tidy = np.strings.add(f"{ahead}/", tidy)
    flags = pc.match_substring_regex(texts, ODD_PATH).to_numpy(zero_copy_only=False)
    odd: Sequence[int] = range(len(texts)) if ahead is None else np.flatnonzero(flags).tolist()  # None: all are outside
    for i in odd:
        text = texts[i].as_py()
        if not text:
            raise DataError(f"{where(i)}: the image path is empty; write a path or remove the row")
        if "\0" in text:
            raise DataError(
                f"{where(i)}: {brief(text)} contains a NUL, which is not allowed in file names; correct the path"
            )
        full = os.path.normpath(os.path.join(start, text.replace("\\", "/")))
        inside = _relative(full, base)
        if inside == "" or text.endswith(("/", "\\")):
            raise DataError(f"{where(i)}: {brief(text)} is a folder, not an image; correct the path")
        if inside is None and not allow_outside:
            raise DataError(
                f"{where(i)}: {brief(text)} is outside {root}; move the image into it, or choose a root that "
                "contains all images (a table can also set allow_outside: true)"
            )
        tidy[i] = Path(full).as_posix() if inside is None else inside
    return tidy


def refuse_repeated(paths: StringArray, where: Callable[[int], str]) -> None:
    """Checks that no image has several rows. ``where`` describes the location of a row for error messages.

    Raises:
        DataError: If an image has several rows. The message names the path and describes the rows with ``where``.
    """
    if pairs := repeated_rows(paths):
        found = listed(f"{brief(str(paths[i]))} ({where(i)}, and {where(j)})" for i, j in pairs)
        raise DataError(f"paths that occur twice: {found}; keep one row per image")


def _strings(texts: Any) -> StringArray:
    """Converts an Arrow array of text to numpy. Only one block of it exists as Python strings at a time."""
    column: StringArray = np.empty(len(texts), dtype=np.dtypes.StringDType())
    for rows, part in zip(blocks(column), blocks(texts), strict=True):
        rows[:] = part.to_numpy(zero_copy_only=False)
    return column


def _relative(path: str, base: str) -> str | None:
    """Returns ``path`` relative to ``base``, "" if they are equal, or None if ``path`` is outside ``base``."""
    relative = Path(os.path.relpath(path, base)).as_posix()
    if relative == ".":
        return ""
    return None if relative == ".." or relative.startswith("../") else relative
