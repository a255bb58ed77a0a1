"""What the datamodule asks of a data set, and what the readers share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cbsa_lightning.data.annotations import AnnotationTable, StringArray, blocks
from cbsa_lightning.errors import DataError


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


def read_lines(file: Path, remedy: str) -> list[str]:
    """Lines of a text file without their ends.

    Raises:
        DataError: The file is missing or is no UTF-8 text; ``remedy`` ends the message.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); {remedy}") from error


# Paths that need a closer look: empty, absolute, with a drive, "\\", "//", "." or "..", or a trailing "/".
_ODD_PATH = r"^$|^/|^[A-Za-z]:|\\|//|(^|/)\.{1,2}(/|$)|/$"


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
        DataError: A path is empty, is no file below ``root``, or lies outside it and may not.
    """
    base, start = os.path.abspath(root), os.path.abspath(folder)
    ahead = _relative(start, base)
    texts = pa.array(paths, pa.large_string())
    tidy = _strings(texts)
    if ahead:
        tidy = np.strings.add(f"{ahead}/", tidy)
    flags = pc.match_substring_regex(texts, _ODD_PATH).to_numpy(zero_copy_only=False)
    odd: Sequence[int] = range(len(texts)) if ahead is None else np.flatnonzero(flags).tolist()  # None: all are outside
    for i in odd:
        text = texts[i].as_py()
        if not text:
            raise DataError(f"{where(i)}: the image path is empty; fill it in or take the row out")
        full = os.path.normpath(os.path.join(start, text.replace("\\", "/")))
        inside = _relative(full, base)
        if inside == "" or text.endswith(("/", "\\")):
            raise DataError(f"{where(i)}: {text!r} is a folder, not an image; correct the path")
        if inside is None and not allow_outside:
            raise DataError(
                f"{where(i)}: {text!r} lies outside {root}; move the image under it, or choose a root that "
                "holds all images (a table can also set allow_outside: true)"
            )
        tidy[i] = Path(full).as_posix() if inside is None else inside
    return tidy


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
