"""Atomic file writing: a file is written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cbsa_lightning.errors import CBSAError, OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Wraps code that writes ``path``, so that errors of the operating system name the file and the remedy.

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
    """Yields a temporary file next to ``path``. It replaces ``path`` once it is completely written to disk.

    Raises:
        OutputError: If the disk is full or the folder is not writable. An existing file is left unchanged.
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
            with suppress(OSError):  # an error of the cleanup would hide the original error
                draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flushes the folder entry to disk. This has no effect on systems that cannot open a folder."""
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
