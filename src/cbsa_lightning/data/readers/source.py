"""Interface of the data sources, and functions shared by the readers."""

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
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, read_text


class Source(ABC):
    """A data set: its classes, and tables of images and labels for training and testing."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names as in the annotation files. Fast, since no image is read."""
        raise NotImplementedError

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """C names as used in prompts."""
        raise NotImplementedError

    @abstractmethod
    def prepare(self) -> None:
        """Downloads or generates files, or checks that they exist. Called in one process before others read them.

        Raises:
            DataError: If something is missing. The message says what to get and where to put it.
        """

    @abstractmethod
    def train(self) -> AnnotationTable:
        """Returns the images to train on."""

    @abstractmethod
    def test(self) -> AnnotationTable | None:
        """Returns the images to test on, if any."""

    def test_under(self, classes: ClassFile) -> AnnotationTable | None:
        """Returns the test images with the classes of a checkpoint, for use without training annotations.

        A source whose classes follow from its training annotations overrides this method.

        Args:
            classes: The classes.

        Raises:
            DataError: If the annotations cannot be used, or have other classes.
        """
        return self.test()

    def describe(self) -> list[str]:
        """Returns sentences for the user on what was detected in the annotation files. May read the files."""
        return []


def require_named(named: Iterable[tuple[str, str | None]]) -> None:
    """Checks that files exist, given as (argument, path) pairs; a path of None is ignored.

    Raises:
        DataError: If one does not. The message names path and argument.
    """
    named = list(named)
    if missing := [f"{path} ({what})" for what, path in named if path is not None and not os.path.isfile(path)]:
        if folders := [f"{path} ({what})" for what, path in named if path is not None and os.path.isdir(path)]:
            raise DataError(f"{listed(folders)} is a folder; give a table with a row for each image (docs/data.md)")
        raise DataError(f"no file at {listed(missing)}; put it there or correct the path")


def read_lines(file: Path, remedy: str) -> list[str]:
    """Returns the lines of a text file without line ends.

    Raises:
        DataError: If the file is missing or is not UTF-8 text; ``remedy`` ends the message.
    """
    try:
        text = read_text(file).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); {remedy}") from error
    # Not splitlines, which also splits at a form feed or U+2028, and names may contain these.
    return text.removesuffix("\n").split("\n") if text else []


# Paths that need a closer look: empty, absolute, with a drive, "\\", "//", "." or "..", a trailing "/", or a NUL.
_ODD_PATH = r"^$|^/|^[A-Za-z]:|\\|//|(^|/)\.{1,2}(/|$)|/$|\x00"


def tidy_paths(
    root: str | Path,
    folder: str | Path,
    paths: Sequence[str] | pa.LargeStringArray,
    where: Callable[[int], str],
    allow_outside: bool = False,
) -> StringArray:
    """Normalizes image paths for a table: "/" between folders, no "." or "..", relative to ``root``.

    Only the text of a path is checked; links on disk are not followed.

    Args:
        root: Folder that the table's paths are relative to.
        folder: Folder that ``paths`` are relative to; usually ``root`` or inside it.
        paths: n paths from the annotations, with slashes or backslashes; none is null.
        where: Row -> file and row, for a message.
        allow_outside: Whether paths may be outside ``root``; these are then stored as absolute paths.

    Returns:
        (n,) strings.

    Raises:
        DataError: If a path is empty, is not a file below ``root``, is outside it without permission, or is not a valid
            file name.
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
    flags = pc.match_substring_regex(texts, _ODD_PATH).to_numpy(zero_copy_only=False)
    odd: Sequence[int] = range(len(texts)) if ahead is None else np.flatnonzero(flags).tolist()  # None: all are outside
    for i in odd:
        text = texts[i].as_py()
        if not text:
            raise DataError(f"{where(i)}: the image path is empty; fill it in or remove the row")
        if "\0" in text:
            raise DataError(f"{where(i)}: {brief(text)} has a NUL, which no file name may contain; correct the path")
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
    """Checks that no image has two rows, for formats whose rows have names.

    Raises:
        DataError: If one has. The message names the path and both rows as described by ``where``.
    """
    if pairs := repeated_rows(paths):
        found = listed(f"{brief(str(paths[i]))} ({where(i)}, and {where(j)})" for i, j in pairs)
        raise DataError(f"the same path twice: {found}; keep one row per image")


def _strings(texts: Any) -> StringArray:
    """Converts an Arrow array of text to numpy, in blocks of Python strings."""
    column: StringArray = np.empty(len(texts), dtype=np.dtypes.StringDType())
    for rows, part in zip(blocks(column), blocks(texts), strict=True):
        rows[:] = part.to_numpy(zero_copy_only=False)
    return column


def _relative(path: str, base: str) -> str | None:
    """Returns ``path`` relative to ``base``: "" for the base itself, None if it is outside."""
    relative = Path(os.path.relpath(path, base)).as_posix()
    if relative == ".":
        return ""
    return None if relative == ".." or relative.startswith("../") else relative
