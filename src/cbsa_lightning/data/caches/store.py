"""RowStore: arrays of one shape on disk under content keys, for what is costly to make and read again and again.

A folder holds ``rows.bin`` (the arrays, one behind the other), ``index.bin`` (their keys, in the same order) and
``settings.json`` (what the rows depend on beside the key). Rows reach the disk before their keys do, so that a key
never names a row that is not whole, whenever a process or the machine stops.
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
"""Length of a key: a 256-bit hash, so that two different contents never share one."""

_FORMAT = 1
_RECORD = struct.Struct(f"<{KEY_BYTES}sI")  # the key, and a checksum of key and row number: tells a torn record
_GB = 1e9
_SETTLED = 2_000_000_000
"""Nanoseconds after which a change of a file shows in its times; file systems count in steps of up to 2 s."""


class RowStore:
    """An append-only, memory-mapped array of rows, each under a key of 32 bytes.

    Many processes may read and several may append at once; a crash at any point loses only the rows that were being
    appended. What others append is seen after :meth:`refresh`. Pickles to a few bytes: a worker process maps the file
    itself. Not for several threads at once.

    Args:
        folder: Where the files lie; made if it is not there.
        shape: Shape of one row.
        dtype: Type of the values.
        settings: What the rows depend on beside their keys, as JSON-like values. Another content than the store was
            made with is refused.
        what: What the rows are, for messages: "decoded images".

    Raises:
        ConfigError: The folder holds rows made with other settings, or files that are none of ours.
        OutputError: The folder cannot be written to; of :meth:`append` too, which then keeps what was there.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, ...], dtype: DTypeLike, settings: Mapping[str, Any], what: str
    ) -> None:
        self.folder, self.shape, self.dtype, self.what = Path(folder), tuple(shape), np.dtype(dtype), what
        self._keys: dict[bytes, int] = {}  # in the order of the rows
        self._length = 0  # of a copy in a worker, which has no need of the keys
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
            raise IndexError(f"{self.folder}: there is no row {row}, which stands for a key that is not there.")
        array: np.ndarray = self.rows[row]
        return array

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def rows(self) -> np.ndarray:
        """All rows known so far, (n, *shape), read-only and mapped: only what is looked at is read.

        Raises:
            ConfigError: The file has been cut or removed since.
        """
        if self._map is None or len(self._map) != self._length:
            shape = (self._length, *self.shape)
            if not self._length:
                self._map = np.empty(shape, self.dtype)
            else:
                if _size(self._rows_file) < self._length * self.row_bytes:
                    raise self._cut()
                # A plain array: slices of np.memmap are objects of their own, slow to make.
                self._map = np.asarray(np.memmap(self._rows_file, self.dtype, "r", shape=shape))
            self._map.flags.writeable = False
        return self._map

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Row numbers of keys, (n,) int64, -1 where there is none."""
        if len(self._keys) < self._length:
            self.refresh()
        return np.fromiter((self._keys.get(key, -1) for key in keys), np.int64, len(keys))

    def refresh(self) -> None:
        """Takes notice of what other processes have appended.

        Raises:
            ConfigError: The files have been cut or removed since.
        """
        # The rows are measured before the index is read: a record that follows late is then left for next time,
        # and never one believed whose row was not there yet.
        whole = _size(self._rows_file) // self.row_bytes
        known = len(self._keys)
        if min(whole, _size(self._index_file) // _RECORD.size) < known:
            raise self._cut()
        for row, (key, checksum) in enumerate(self._records(known), known):
            if row >= whole or checksum != zlib.crc32(key, row):
                break  # torn, or just being written
            self._keys[key] = row
        self._length = len(self._keys)

    def append(self, keys: Sequence[bytes], rows: ArrayLike) -> None:
        """Adds rows whose keys are not there yet, all with one flush to the disk.

        Args:
            keys: n keys of 32 bytes; one that is there already, or comes twice, keeps its first row.
            rows: (n, *shape) of the store's dtype.

        Raises:
            DataError: Keys or rows are not of that form.
        """
        array = np.asarray(rows)
        if array.dtype != self.dtype or array.shape != (len(keys), *self.shape):
            raise DataError(
                f"{self.folder}: {len(keys)} {self.what} must come as {self.dtype} of shape "
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
            # What a crash has left behind the last whole row goes first, records before rows.
            _write(self._index_file, first * _RECORD.size, b"")
            _write(self._rows_file, first * self.row_bytes, np.ascontiguousarray(array[list(new.values())]).data)
            records = (_RECORD.pack(key, zlib.crc32(key, row)) for row, key in enumerate(new, first))
            _write(self._index_file, first * _RECORD.size, b"".join(records))
            self.refresh()

    def require_room(self, missing: int, limit_gb: float, remedy: str) -> None:
        """Checks that more rows may and can be kept.

        Args:
            missing: Rows to come.
            limit_gb: GB (10^9 bytes) that the store may take, with what it has.
            remedy: What the user can do, for the message.

        Raises:
            ConfigError: They would exceed the limit or the free space of the disk.
        """
        more, total = (n * self.row_bytes / _GB for n in (missing, missing + len(self)))
        need = f"{self.folder}: {missing} more {self.what} need {more:.1f} GB"
        if missing and not total <= limit_gb:  # NaN is no limit that could be kept
            raise ConfigError(f"{need}, {total:.1f} GB with those there; {limit_gb:g} GB are allowed. {remedy}")
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
        return ConfigError(f"{self.folder}: the files were cut or removed while in use; restart.")

    def _settle(self, settings: dict[str, Any]) -> None:
        """Writes the settings of a new store, or compares those of an old one."""
        file = self.folder / "settings.json"
        asked = json.loads(json.dumps(settings))
        if not file.exists():
            with self._lock():
                if not file.exists():  # nobody was quicker
                    if self._rows_file.exists():
                        raise ConfigError(f"{file} is missing beside {self.what}; delete the folder.")
                    _replace(file, json.dumps(asked, indent=1))
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(f"{file}: damaged ({error}); delete the folder; it is recreated.") from error
        if names := [name for name in {**there, **asked} if there.get(name) != asked.get(name)]:
            found = listed(f"{name} {there.get(name)!r} (asked for: {asked.get(name)!r})" for name in names)
            raise ConfigError(
                f"{file}: these {self.what} were made with {found}; choose another folder, or delete this one."
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time; the system lets go of it when the process ends, however that is."""
        with writing(self.folder / "lock"):
            file = (self.folder / "lock").open("ab")
        with file:
            if sys.platform == "win32":
                file.seek(0)
                while True:
                    try:
                        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                        break
                    except OSError:  # taken for ten seconds: go on waiting
                        continue
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def content_keys(files: Sequence[Path], memo: Path, threads: int = 4) -> list[bytes]:
    """Hashes the contents of files; those that have not changed since the last time are not read again.

    As git does, a file counts as unchanged while its path, size and times are those of the memo. Times less than two
    seconds old prove nothing, since a further change may not show in them: such files are read again next time.

    Args:
        files: The files.
        memo: Where the hashes are kept; a damaged one is recreated.
        threads: Files read at once.

    Returns:
        BLAKE2b of 32 bytes for each file.

    Raises:
        DataError: A file is missing or cannot be read.
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
        except OutputError as error:  # the hashes are known all the same
            warnings.warn(
                f"{memo}: hashes of files could not be kept ({error.strerror}), so the files are read again next time.",
                stacklevel=2,
            )
    return [bytes.fromhex(known[path][-1]) for path in paths]


def _read_memo(memo: Path) -> dict[str, list[Any]]:
    """Path -> [size, mtime, ctime (nanoseconds), hash in hexadecimal digits]."""
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
        raise DataError(f"{path}: {error.strerror}; check the image root, or that the download is whole") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash(path: str) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights and the disk") from error


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
    """Writes a file that is, at any time, the old one or the new one whole."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # process numbers are unique on one machine only
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
