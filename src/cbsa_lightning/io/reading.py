"""Opening of input files. Special files and files that do not fit into memory are rejected."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from cbsa_lightning.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def brief(text: object, most: int = 200) -> str:
    """Returns ``repr(text)`` for a message. A very long text is truncated, and its length is appended."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[:most]}... ({len(str(text)):,} characters)"


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file for reading bytes.

    Raises:
        DataError: If the path is not a regular file. Opening a named pipe, for example, would block forever.
        OSError: If the file cannot be opened.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except IsADirectoryError:
        kind = stat.S_IFDIR
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        # A ValueError means that the path contains a null character.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{brief(os.fspath(path))} cannot be a file name ({reason}); correct the path") from error
    else:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind == stat.S_IFREG:
            return file
        file.close()
    raise DataError(f"{path}: this is {_KINDS.get(kind, 'a special file')}, not a file; correct the path")


def read_text(path: Path, most: int | None = None) -> str:
    """Reads a whole UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        most: Maximum size in bytes. With None, the file may use half of the memory, because its bytes and its text are
            in memory at the same time.

    Raises:
        DataError: If ``path`` is not a regular file, or the file is too large.
        OSError: If the file cannot be read.
        UnicodeDecodeError: If the file is not valid UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise DataError(
                f"{path}: the file has {size / 1e6:,.1f} MB, but at most {most / 1e6:,.1f} MB are allowed; "
                "correct the path"
            )
        refuse_larger_than_memory(path, size)
        return file.read().decode("utf-8-sig")


def refuse_larger_than_memory(path: Path, size: int) -> None:
    """Checks that a file of ``size`` bytes fits into memory twice, once as bytes and once as text.

    Raises:
        DataError: If it does not fit. The message states the size of the file and of the memory.
    """
    memory = memory_of_machine()
    if 2 * size > memory:
        raise DataError(
            f"{path}: the file has {size / 1e9:,.1f} GB. Reading it needs twice as much memory, but this machine has "
            f"only {memory / 1e9:,.1f} GB; remove fields that are not needed (outlines, captions)"
        )


def memory_of_machine() -> int:
    """Returns the size of the machine's memory in bytes, or a huge number if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # the size is unknown, so do not limit files
        return 1 << 60


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
