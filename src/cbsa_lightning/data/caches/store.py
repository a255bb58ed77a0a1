"""The class `RowStore`, which stores arrays of equal shape on disk under keys that identify their content.

It is intended for data that is slow to compute and read many times. A folder contains ``rows.bin`` (the concatenated
arrays), ``index.bin`` (their keys, in the same order) and ``settings.json`` (the settings that the rows depend on, in
addition to their keys). Rows are flushed to disk before their keys, so a key never refers to an incomplete row, even if
a process or the machine crashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from tqdm.auto import tqdm

from cbsa_lightning.data.shards import file_on_disk, open_image
from cbsa_lightning.errors import ConfigError, DataError, OutputError, listed
from cbsa_lightning.io.files import writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["KEY_BYTES", "RowStore", "content_keys"]

KEY_BYTES = 32
"""Length of a key. With a 256-bit hash, different contents never have the same key."""

_FORMAT = 1
_RECORD = struct.Struct(f"<{KEY_BYTES}sI")  # key, and a checksum that detects incomplete records
_GB = 1e9
_SETTLED = 2_000_000_000
"""Nanoseconds after which timestamps reliably show a change. Some file systems have a resolution of 2 s."""


class RowStore:
    """An append-only, memory-mapped array of rows, each with a key of 32 bytes.

    Several processes may read and append at the same time. A crash affects only the rows that were being appended.
    Rows that other processes have appended become visible after :meth:`refresh`. A pickled store has only a few bytes,
    and each worker maps the file itself. Not thread-safe.

    Args:
        folder: Folder that contains the files. It is created if it does not exist.
        shape: Shape of one row.
        settings: Settings that the rows depend on, in addition to their keys, as JSON-like values. They must equal the
            settings that the store was created with.
            store was created with.
        what: Description of the rows for error messages, such as "decoded images".

    Raises:
        ConfigError: If the folder contains rows that were created with other settings, or unrelated files.
        OutputError: If the folder is not writable. :meth:`append` also raises this error, without adding any rows.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, ...], dtype: DTypeLike, settings: Mapping[str, Any], what: str
    ) -> None:
        self.folder, self.shape, self.dtype, self.what = Path(folder), tuple(shape), np.dtype(dtype), what
        self._keys: dict[bytes, int] = {}  # in the order of the rows
        self._length = 0  # remains valid in a worker, whose copy lacks the keys
        self._map: np.ndarray | None = None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._settle({"format": _FORMAT, "shape": list(self.shape), "dtype": self.dtype.str, **settings})
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": {}, "_map": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns the array of a row. It is read-only."""
        if row < 0:
            raise IndexError(f"{self.folder}: row {row} does not exist; it represents a missing key.")
        array: np.ndarray = self.rows[row]
        return array

    @property
    def row_bytes(self) -> int:
        """Number of bytes per row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def rows(self) -> np.ndarray:
        """All rows that are currently known, (n, *shape), read-only and memory-mapped.

        Raises:
            ConfigError: If the file has been truncated or removed in the meantime.
        """
        if self._map is None or len(self._map) != self._length:
            shape = (self._length, *self.shape)
            if not self._length:
                self._map = np.empty(shape, self.dtype)
            else:
                if _size(self._rows_file) < self._length * self.row_bytes:
                    raise self._cut()
                # It is converted to a plain array, since slices of np.memmap are slow to create.
                self._map = np.asarray(np.memmap(self._rows_file, self.dtype, "r", shape=shape))
            self._map.flags.writeable = False
        return self._map

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns the row numbers of keys, (n,) int64. They are -1 for missing keys."""
        if len(self._keys) < self._length:
            self.refresh()
        return np.fromiter((self._keys.get(key, -1) for key in keys), np.int64, len(keys))

    def refresh(self) -> None:
        """Reads the index entries that other processes have appended.

        Raises:
            ConfigError: If the files have been truncated or removed in the meantime.
        """
        # The size of the rows is determined before the index is read. Records that are appended in between are left for
        # the next refresh, so that a record is never used before its row exists.
        whole = _size(self._rows_file) // self.row_bytes
        known = len(self._keys)
        if min(whole, _size(self._index_file) // _RECORD.size) < known:
            raise self._cut()
        for row, (key, checksum) in enumerate(self._records(known), known):
            if row >= whole or checksum != zlib.crc32(key, row):
                break  # incomplete, or still being written
            self._keys[key] = row
        self._length = len(self._keys)

    def append(self, keys: Sequence[bytes], rows: ArrayLike) -> None:
        """Adds rows for new keys and flushes them to disk.

        Args:
            keys: n keys of 32 bytes. A key that exists or is repeated keeps its first row.
            rows: Array (n, *shape) with the dtype of the store.

        Raises:
            DataError: If the keys or rows have the wrong length, shape or type.
        """
        array = np.asarray(rows)
        if array.dtype != self.dtype or array.shape != (len(keys), *self.shape):
            raise DataError(
                f"{self.folder}: {len(keys)} {self.what} must be given as {self.dtype} of shape "
                f"{(len(keys), *self.shape)}, found {array.dtype} of shape {array.shape}."
            )
        if wrong := {len(key) for key in keys} - {KEY_BYTES}:
            raise DataError(f"{self.folder}: keys must have {KEY_BYTES} bytes, found {listed(sorted(wrong))}.")
        with self._lock():
            self.refresh()
            new: dict[bytes, int] = {}
            for i, key in enumerate(keys):
                if key not in self._keys:
                    new.setdefault(key, i)
            first = len(self._keys)
            # Remove data that a crash has left after the last complete row, first records and then rows.
            _write(self._index_file, first * _RECORD.size, b"")
            _write(self._rows_file, first * self.row_bytes, np.ascontiguousarray(array[list(new.values())]).data)
            records = (_RECORD.pack(key, zlib.crc32(key, row)) for row, key in enumerate(new, first))
            _write(self._index_file, first * _RECORD.size, b"".join(records))
            self.refresh()

    def require_room(self, missing: int, limit_gb: float, remedy: str) -> None:
        """Checks that the limit and the free disk space allow more rows.

        Args:
            missing: Number of rows to add.
            limit_gb: Maximum size of the store in GB (10^9 bytes), including existing rows.
            remedy: Remedy for the error message.

        Raises:
            ConfigError: If the rows would exceed the limit or the free disk space.
        """
        more, total = (n * self.row_bytes / _GB for n in (missing, missing + len(self)))
        need = f"{self.folder}: {missing} more {self.what} need {more:.1f} GB"
        if missing and not total <= limit_gb:  # also true for a limit of NaN
            raise ConfigError(f"{need}, {total:.1f} GB with the existing ones; {limit_gb:g} GB are allowed. {remedy}")
        free = shutil.disk_usage(self.folder).free / _GB
        if more > free:
            raise ConfigError(f"{need}; the disk has {free:.1f} GB free. {remedy}")

    # Files -----------------------------------------------------------------------------------------------------

    @property
    def _rows_file(self) -> Path:
        return self.folder / "rows.bin"

    @property
    def _index_file(self) -> Path:
        return self.folder / "index.bin"

    def _records(self, start: int) -> Iterator[tuple[bytes, int]]:
        try:
            with self._index_file.open("rb") as file:
                file.seek(start * _RECORD.size)
                content = file.read()
        except FileNotFoundError:
            return
        yield from _RECORD.iter_unpack(content[: len(content) // _RECORD.size * _RECORD.size])

    def _cut(self) -> ConfigError:
        return ConfigError(f"{self.folder}: the files were truncated or removed while in use; start the run again.")

    def _settle(self, settings: dict[str, Any]) -> None:
        """Writes the settings of a new store, or checks those of an existing one."""
        file = self.folder / "settings.json"
        asked = json.loads(json.dumps(settings))
        if not file.exists():
            with self._lock():
                if not file.exists():  # no other process has created it in the meantime
                    if self._rows_file.exists():
                        raise ConfigError(f"{file} is missing, but the folder contains {self.what}; delete the folder.")
                    _replace(file, json.dumps(asked, indent=1))
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(
                f"{file}: the file is damaged ({error}); delete the folder. It will be created again."
            ) from error
        if names := [name for name in {**there, **asked} if there.get(name) != asked.get(name)]:
            found = listed(f"{name} {there.get(name)!r} (requested: {asked.get(name)!r})" for name in names)
            raise ConfigError(
                f"{file}: these {self.what} were created with {found}; choose another folder, or delete this one."
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Locks the store for one process. If the process crashes, the operating system releases the lock."""
        with writing(self.folder / "lock"):
            file = (self.folder / "lock").open("ab")
        with file:
            if sys.platform == "win32":
                file.seek(0)
                while True:
                    try:
                        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                        break
                    except OSError:  # timeout after ten seconds, so wait again
                        continue
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def content_keys(files: Sequence[Path], memo: Path, threads: int = 4) -> list[bytes]:
    """Hashes the contents of files. Files that are unchanged since the last call are not read again.

    As in git, a file counts as unchanged if its path, size and times equal those in the memo. Times less than two
    seconds old may not reveal a later change, so files with such times are read again in the next call.

    Args:
        files: The files.
        memo: File that stores the hashes. If it is damaged, it is created again.
        threads: Number of files that are read at the same time.

    Returns:
        BLAKE2b hash of each file, 32 bytes.

    Raises:
        DataError: If a file is missing or cannot be read.
    """
    known = _read_memo(memo)
    paths = [os.path.abspath(file) for file in files]
    found = {path: _stamp(path) for path in dict.fromkeys(paths)}
    changed = [path for path, stamp in found.items() if known.get(path, [])[:-1] != stamp]
    read = {}
    if changed:
        now = time.time_ns()
        with ThreadPoolExecutor(threads) as pool:
            hashes = tqdm(pool.map(_hash, changed), "Hashing files", len(changed), leave=False, delay=1)
            read = dict(zip(changed, hashes, strict=True))
        for path, digest in read.items():
            known[path] = [*found[path], digest]
        kept = {path: line for path, line in known.items() if max(line[1:3]) < now - _SETTLED}
        try:
            _replace(memo, json.dumps(kept))
        except OutputError as error:  # without the memo, the hashes are still valid
            warnings.warn(
                f"{memo}: the hashes of files could not be stored ({error.strerror}); the files will be read again.",
                stacklevel=2,
            )
    return [bytes.fromhex(known[path][-1]) for path in paths]


def _read_memo(memo: Path) -> dict[str, list[Any]]:
    """Reads a mapping from path to [size, mtime and ctime in nanoseconds, hexadecimal hash]."""
    try:
        lines = json.loads(memo.read_text(encoding="utf-8"))
        sound = all(len(line) == 4 and len(bytes.fromhex(line[3])) == KEY_BYTES for line in lines.values())
        return dict(lines) if sound else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(file_on_disk(path))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; check the image root, and whether the download is complete"
        ) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash(path: str) -> str:
    try:
        with open_image(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).hexdigest()
    except OSError as error:
        raise DataError(
            f"{path}: the file cannot be read ({error.strerror}); check its permissions and the disk"
        ) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write(file: Path, start: int, content: bytes | memoryview) -> None:
    """Truncates a file at ``start``, appends ``content``, and flushes it to disk."""
    with writing(file), file.open("r+b" if file.exists() else "w+b") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell() == start and not len(content):
            return
        stream.truncate(start)
        stream.seek(start)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _replace(file: Path, text: str) -> None:
    """Replaces a text file atomically."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # process ids are only unique on one machine
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
