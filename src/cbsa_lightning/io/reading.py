"""Opening the files that people name: regular ones only, and none that cannot fit into memory."""

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
    """``repr(text)`` for a message; of a very long one the beginning, and how long it is."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[:most]}... ({len(str(text)):,} characters)"


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to read its bytes.

    Raises:
        DataError: There is something that is no file, such as a named pipe, whose opening would wait for ever.
        OSError: As ``open``.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except IsADirectoryError:
        kind = stat.S_IFDIR
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)  # a NUL
        raise DataError(
            f"{brief(os.fspath(path))} cannot be the name of a file ({reason}); correct the path"
        ) from error
    else:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind == stat.S_IFREG:
            return file
        file.close()
    raise DataError(f"{path}: is {_KINDS.get(kind, 'something else')}, not a file; correct the path")


def read_text(path: Path, most: int | None = None) -> str:
    """The whole of a UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        most: Bytes that it may have; None: what memory holds, twice over, since text is made from bytes.

    Raises:
        DataError: It is no regular file, or too large.
        OSError: As ``open``.
        UnicodeDecodeError: It is not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise DataError(
                f"{path}: has {size / 1e6:,.1f} MB where at most {most / 1e6:,.1f} are read; correct the path"
            )
        refuse_larger_than_memory(path, size)
        return file.read().decode("utf-8-sig")


def refuse_larger_than_memory(path: Path, size: int) -> None:
    """Refuses a file of ``size`` bytes whose bytes and text memory cannot hold: better now than when it is full.

    Raises:
        DataError: Naming both sizes.
    """
    memory = memory_of_machine()
    if 2 * size > memory:
        raise DataError(
            f"{path}: has {size / 1e9:,.1f} GB, and reading it takes twice that; this machine has "
            f"{memory / 1e9:,.1f} GB of memory: take out what is not needed (outlines, captions)"
        )


def memory_of_machine() -> int:
    """Bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system: nothing can be said, so nothing is refused
        return 1 << 60


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
