"""Opens input files. Refuses special files and files that do not fit into memory."""

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
    """Returns ``repr(text)`` for a message. A very long text is cut, and its length is added."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[:most]}... ({len(str(text)):,} characters)"


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to read its bytes.

    Raises:
        DataError: If the path is not a regular file. Opening a named pipe, for example, would block forever.
        OSError: As for ``open``.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except IsADirectoryError:
        kind = stat.S_IFDIR
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)  # a NUL
        raise DataError(f"{brief(os.fspath(path))} cannot be a file name ({reason}); correct the path") from error
    else:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind == stat.S_IFREG:
            return file
        file.close()
    raise DataError(f"{path}: is {_KINDS.get(kind, 'something else')}, not a file; correct the path")


def read_text(path: Path, most: int | None = None) -> str:
    """Reads a whole UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        most: Maximum size in bytes. None allows half of the memory, since bytes and text exist at the same time.

    Raises:
        DataError: If it is not a regular file, or is too large.
        OSError: As for ``open``.
        UnicodeDecodeError: If it is not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise DataError(
                f"{path}: has {size / 1e6:,.1f} MB, but at most {most / 1e6:,.1f} MB are allowed; correct the path"
            )
        refuse_larger_than_memory(path, size)
        return file.read().decode("utf-8-sig")


def refuse_larger_than_memory(path: Path, size: int) -> None:
    """Checks that the bytes and the text of a file of ``size`` bytes fit into memory together.

    Raises:
        DataError: If they do not. The message names both sizes.
    """
    memory = memory_of_machine()
    if 2 * size > memory:
        raise DataError(
            f"{path}: the file has {size / 1e9:,.1f} GB and reading it needs twice as much memory, but this machine "
            f"has {memory / 1e9:,.1f} GB; remove fields that are not needed (outlines, captions)"
        )


def memory_of_machine() -> int:
    """Returns the memory of this machine in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # unknown on this system: allow every size
        return 1 << 60


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
