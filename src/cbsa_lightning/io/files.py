"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cbsa_lightning.errors import CBSAError, OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes ``path``: a refusal of the system names the file and the remedy.

    Raises:
        OutputError: If the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, CBSAError):
            raise
        raise OutputError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place once the disk has all of it.

    Raises:
        OutputError: If the disk is full, or the folder cannot be written to; what was there is still there.
    """
    draft = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):  # of a disk that became read-only: it would hide the reason
                draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Has the disk know the new name as well; not every system can open a folder."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        pass
    finally:
        os.close(number)
