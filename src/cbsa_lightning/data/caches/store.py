"""RowStore: arrays of one shape on disk by content keys, for data that is slow to compute and read many times.

A folder contains ``rows.bin`` (the concatenated arrays), ``index.bin`` (their keys, in the same order) and
``settings.json`` (what the rows depend on besides the key). Rows are flushed to disk before their keys, so a key never
refers to an incomplete row, whenever a process or the machine stops.
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

from cbsa_lightning.errors import ConfigError, DataError, OutputError, listed
from cbsa_lightning.io.files import writing
from cbsa_lightning.io.reading import open_regular

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["KEY_BYTES", "RowStore", "content_keys"]

KEY_BYTES = 32
"""Length of a key: a 256-bit hash, so that two different contents never share a key."""

_FORMAT = 1
_RECORD = struct.Struct(f"<{KEY_BYTES}sI")  # key, and a checksum of key and row number that detects torn records
_GB = 1e9
_SETTLED = 2_000_000_000
"""Nanoseconds until a file's timestamps reliably show a change; file systems have a resolution of up to 2 s."""


class RowStore:
    """An append-only, memory-mapped array of rows, each with a key of 32 bytes.

    Many processes may read and several may append at once. A crash loses only the rows that were being appended.
    :meth:`refresh` makes rows visible that other processes have appended. Pickles to a few bytes, and each worker maps
    the file itself. Not thread-safe.

    Args:
        folder: Folder of the files; created if missing.
        shape: Shape of one row.
        dtype: Type of the values.
        settings: What the rows depend on besides their keys, as JSON-like values. Must equal the settings that the
            store was created with.
        what: What the rows are, for messages: "decoded images".

    Raises:
        ConfigError: If the folder contains rows made with other settings, or foreign files.
        OutputError: If the folder cannot be written to. :meth:`append` raises it too, and then adds nothing.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, ...], dtype: DTypeLike, settings: Mapping[str, Any], what: str
    ) -> None:
        self.folder, self.shape, self.dtype, self.what = Path(folder), tuple(shape), np.dtype(dtype), what
        self._keys: dict[bytes, int] = {}  # in the order of the rows
        self._length = 0  # of a copy in a worker, which does not need the keys
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
        """The array of one row, read-only."""
        if row < 0:
            raise IndexError(f"{self.folder}: there is no row {row}, which stands for a missing key.")
        array: np.ndarray = self.rows[row]
        return array

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def rows(self) -> np.ndarray:
        """All rows known so far, (n, *shape), read-only and memory-mapped.

        Raises:
            ConfigError: If the file has been truncated or removed since.
        """
        if self._map is None or len(self._map) != self._length:
            shape = (self._length, *self.shape)
            if not self._length:
                self._map = np.empty(shape, self.dtype)
            else:
                if _size(self._rows_file) < self._length * self.row_bytes:
                    raise self._cut()
                # A plain array: slices of np.memmap are slow to create.
                self._map = np.asarray(np.memmap(self._rows_file, self.dtype, "r", shape=shape))
            self._map.flags.writeable = False
        return self._map

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns the row numbers of keys, (n,) int64, -1 for missing ones."""
        if len(self._keys) < self._length:
            self.refresh()
        return np.fromiter((self._keys.get(key, -1) for key in keys), np.int64, len(keys))

    def refresh(self) -> None:
        """Reads the index entries that other processes have appended.

        Raises:
            ConfigError: If the files have been truncated or removed since.
        """
        # Measure the rows before reading the index: records appended in between are left for the next refresh, so
        # a record is never used before its row exists.
        whole = _size(self._rows_file) // self.row_bytes
        known = len(self._keys)
        if min(whole, _size(self._index_file) // _RECORD.size) < known:
            raise self._cut()
        for row, (key, checksum) in enumerate(self._records(known), known):
            if row >= whole or checksum != zlib.crc32(key, row):
                break  # torn, or still being written
            self._keys[key] = row
        self._length = len(self._keys)

    def append(self, keys: Sequence[bytes], rows: ArrayLike) -> None:
        """Adds rows for new keys, with one flush to disk.

        Args:
            keys: n keys of 32 bytes; an existing or repeated key keeps its first row.
            rows: (n, *shape) of the store's dtype.

        Raises:
            DataError: If keys or rows have the wrong form.
        """
        array = np.asarray(rows)
        if array.dtype != self.dtype or array.shape != (len(keys), *self.shape):
            raise DataError(
                f"{self.folder}: {len(keys)} {self.what} must be given as {self.dtype} of shape "
                f"{(len(keys), *self.shape)}, found {array.dtype} of shape {array.shape}."
            )
        if wrong := {len(key) for key in keys} - {KEY_BYTES}:
            raise DataError(f"{self.folder}: keys have {KEY_BYTES} bytes, found {listed(sorted(wrong))}.")
        with self._lock():
            self.refresh()
            new: dict[bytes, int] = {}
            for i, key in enumerate(keys):
                if key not in self._keys:
                    new.setdefault(key, i)
            first = len(self._keys)
            # Remove what a crash has left after the last complete row, records before rows.
            _write(self._index_file, first * _RECORD.size, b"")
            _write(self._rows_file, first * self.row_bytes, np.ascontiguousarray(array[list(new.values())]).data)
            records = (_RECORD.pack(key, zlib.crc32(key, row)) for row, key in enumerate(new, first))
            _write(self._index_file, first * _RECORD.size, b"".join(records))
            self.refresh()

    def require_room(self, missing: int, limit_gb: float, remedy: str) -> None:
        """Checks that the limit and the disk have room for more rows.

        Args:
            missing: Number of rows to add.
            limit_gb: Maximum size of the store in GB (10^9 bytes), including existing rows.
            remedy: What the user can do, for the message.

        Raises:
            ConfigError: If the rows would exceed the limit or the free space of the disk.
        """
        more, total = (n * self.row_bytes / _GB for n in (missing, missing + len(self)))
        need = f"{self.folder}: {missing} more {self.what} need {more:.1f} GB"
        if missing and not total <= limit_gb:  # also refuses NaN
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
        return ConfigError(f"{self.folder}: the files were truncated or removed while in use; restart.")

    def _settle(self, settings: dict[str, Any]) -> None:
        """Writes the settings of a new store, or checks those of an existing one."""
        file = self.folder / "settings.json"
        asked = json.loads(json.dumps(settings))
        if not file.exists():
            with self._lock():
                if not file.exists():  # no other process has created it meanwhile
                    if self._rows_file.exists():
                        raise ConfigError(f"{file} is missing next to {self.what}; delete the folder.")
                    _replace(file, json.dumps(asked, indent=1))
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(f"{file}: damaged ({error}); delete the folder; it is recreated.") from error
        if names := [name for name in {**there, **asked} if there.get(name) != asked.get(name)]:
            found = listed(f"{name} {there.get(name)!r} (requested: {asked.get(name)!r})" for name in names)
            raise ConfigError(
                f"{file}: these {self.what} were made with {found}; choose another folder, or delete this one."
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Locks the store for one process; the operating system releases the lock even if the process crashes."""
        with writing(self.folder / "lock"):
            file = (self.folder / "lock").open("ab")
        with file:
            if sys.platform == "win32":
                file.seek(0)
                while True:
                    try:
                        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                        break
                    except OSError:  # locked for ten seconds: keep waiting
                        continue
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def content_keys(files: Sequence[Path], memo: Path, threads: int = 4) -> list[bytes]:
    """Hashes the contents of files. Files that are unchanged since the last call are not read again.

    As in git, a file counts as unchanged if its path, size and times equal those in the memo. Times less than two
    seconds old are not reliable, since they may not show a later change; such files are read again next time.

    Args:
        files: The files.
        memo: File that stores the hashes; recreated if damaged.
        threads: Number of files read at once.

    Returns:
        BLAKE2b of 32 bytes for each file.

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
        except OutputError as error:  # the hashes are valid even if the memo cannot be written
            warnings.warn(
                f"{memo}: hashes of files could not be stored ({error.strerror}); the files are read again next time.",
                stacklevel=2,
            )
    return [bytes.fromhex(known[path][-1]) for path in paths]


def _read_memo(memo: Path) -> dict[str, list[Any]]:
    """Reads path -> [size, mtime, ctime (nanoseconds), hexadecimal hash]."""
    try:
        lines = json.loads(memo.read_text(encoding="utf-8"))
        sound = all(len(line) == 4 and len(bytes.fromhex(line[3])) == KEY_BYTES for line in lines.values())
        return dict(lines) if sound else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the image root, or that the download is complete") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash(path: str) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error


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
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # process ids are unique only on one machine
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
