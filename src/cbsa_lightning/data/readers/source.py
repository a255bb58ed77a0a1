"""What the datamodule asks of a data set, and what the readers share."""

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
    """A data set: its classes, and a table of images and labels for training and for the test."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names as in the annotation files; cheap, and no image is read."""
        raise NotImplementedError

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """C names as put in prompts."""
        raise NotImplementedError

    @abstractmethod
    def prepare(self) -> None:
        """What one process does before the others read: download, generate, or check that files lie there.

        Raises:
            DataError: Something is missing; the message says what to get and where it must lie.
        """

    @abstractmethod
    def train(self) -> AnnotationTable:
        """The images to train on."""

    @abstractmethod
    def test(self) -> AnnotationTable | None:
        """The images to test on, if there are any."""

    def test_under(self, classes: ClassFile) -> AnnotationTable | None:
        """The test images under the classes of a checkpoint, for who has no training annotations.

        A source whose classes follow from its training annotations overrides this method.

        Args:
            classes: The classes.

        Raises:
            DataError: The annotations cannot be used, or have other classes.
        """
        return self.test()

    def describe(self) -> list[str]:
        """Sentences on what was detected in the annotation files, for the user; the files may be read for it."""
        return []


def require_named(named: Iterable[tuple[str, str | None]]) -> None:
    """Checks that files are there, given as (argument, path) pairs; a path of None is none to check.

    Raises:
        DataError: One is not, naming path and argument.
    """
    named = list(named)
    if missing := [f"{path} ({what})" for what, path in named if path is not None and not os.path.isfile(path)]:
        if folders := [f"{path} ({what})" for what, path in named if path is not None and os.path.isdir(path)]:
            raise DataError(f"{listed(folders)} is a folder; give a table with a row for each image (docs/data.md)")
        raise DataError(f"no file at {listed(missing)}; put it there or correct the path")


def read_lines(file: Path, remedy: str) -> list[str]:
    """Lines of a text file without their ends.

    Raises:
        DataError: The file is missing or is no UTF-8 text; ``remedy`` ends the message.
    """
    try:
        text = read_text(file).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); {remedy}") from error
    # Not splitlines: to it a form feed or U+2028, which a name may have, ends a line as well.
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
    """Image paths as a table keeps them: "/" between folders, no "." or "..", relative to ``root``.

    Only the text of a path is judged; links on the disk are not followed.

    Args:
        root: Folder that the table's paths are relative to.
        folder: Folder that ``paths`` are relative to; usually ``root`` or inside it.
        paths: n paths as found in the annotations, with slashes or backslashes; none is null.
        where: Row -> file and row, for a message.
        allow_outside: Whether paths may lie outside ``root``; these are then kept absolute.

    Returns:
        (n,) strings.

    Raises:
        DataError: A path is empty, is no file below ``root``, lies outside it and may not, or is no text that a file
            name can have.
    """
    base, start = os.path.abspath(root), os.path.abspath(folder)
    ahead = _relative(start, base)
    try:
        texts = pa.array(paths, pa.large_string())
    except UnicodeEncodeError as error:
        i = first_not_unicode(paths)
        raise DataError(
            f"{where(i)}: {brief(paths[i])} is no Unicode text ({error.reason}); correct the path"
        ) from error
    tidy = _strings(texts)
    if ahead:
        tidy = np.strings.add(f"{ahead}/", tidy)
    flags = pc.match_substring_regex(texts, _ODD_PATH).to_numpy(zero_copy_only=False)
    odd: Sequence[int] = range(len(texts)) if ahead is None else np.flatnonzero(flags).tolist()  # None: all are outside
    for i in odd:
        text = texts[i].as_py()
        if not text:
            raise DataError(f"{where(i)}: the image path is empty; fill it in or take the row out")
        if "\0" in text:
            raise DataError(f"{where(i)}: {brief(text)} has a NUL, which no file name has; correct the path")
        full = os.path.normpath(os.path.join(start, text.replace("\\", "/")))
        inside = _relative(full, base)
        if inside == "" or text.endswith(("/", "\\")):
            raise DataError(f"{where(i)}: {brief(text)} is a folder, not an image; correct the path")
        if inside is None and not allow_outside:
            raise DataError(
                f"{where(i)}: {brief(text)} lies outside {root}; move the image under it, or choose a root that "
                "holds all images (a table can also set allow_outside: true)"
            )
        tidy[i] = Path(full).as_posix() if inside is None else inside
    return tidy


def refuse_repeated(paths: StringArray, where: Callable[[int], str]) -> None:
    """Refuses two rows for one image, of a format whose rows have names of their own.

    Raises:
        DataError: Names the path and both rows, as ``where`` does.
    """
    if pairs := repeated_rows(paths):
        found = listed(f"{brief(str(paths[i]))} ({where(i)}, and {where(j)})" for i, j in pairs)
        raise DataError(f"the same path twice: {found}; keep one row an image")


def _strings(texts: Any) -> StringArray:
    """An Arrow array of text as numpy's, by way of a few Python strings at a time."""
    column: StringArray = np.empty(len(texts), dtype=np.dtypes.StringDType())
    for rows, part in zip(blocks(column), blocks(texts), strict=True):
        rows[:] = part.to_numpy(zero_copy_only=False)
    return column


def _relative(path: str, base: str) -> str | None:
    """``path`` relative to ``base``: "" for the base itself, None if it lies outside."""
    relative = Path(os.path.relpath(path, base)).as_posix()
    if relative == ".":
        return ""
    return None if relative == ".." or relative.startswith("../") else relative
