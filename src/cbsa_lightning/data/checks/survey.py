"""Inspection of the image files of a table. Each file is read once, and decoded only if it may be incomplete."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.images import Header, decode, foreign_kind, read_header
from cbsa_lightning.data.shards import open_image
from cbsa_lightning.errors import DataError

SMALLEST = 32
"""Minimum side in pixels. Images with a shorter side are reported as tiny."""

_THREADS = 8  # number of files that are read at the same time
_CHUNK = 4096
_REASONS = 1000  # maximum number of stored messages; further files usually fail for the same reason
_DIGEST = 16  # bytes
_JPEG = "jpg jpeg jpe jfif mpo"
_SUFFIXES = {
    "JPEG": _JPEG,
    "MPO": _JPEG,  # a JPEG with a second image, as written by some phones
    "PNG": "png apng",
    "WEBP": "webp",
    "BMP": "bmp dib",
    "GIF": "gif",
    "TIFF": "tif tiff",
    "PPM": "ppm pgm pbm pnm",
    "JPEG2000": "jp2 j2k j2c jpc jpf jpx",
    "AVIF": "avif avifs",
}
_KINDS = tuple(_SUFFIXES)


@dataclass(frozen=True, eq=False)
class Survey:
    """Findings about n image files, stored as columns.

    Attributes:
        missing: (n,) bool, whether the file does not exist.
        unreadable: (n,) bool, whether the file exists but cannot be read as an image.
        tiny: (n,) bool, whether a side has fewer than :data:`SMALLEST` pixels.
        misnamed: (n,) bool, whether the suffix belongs to another format.
        kind: (n,) uint8, the format. :meth:`kind_of` returns its name.
        digest: (n, 2) uint64, the hash of the content of each readable file.
        reasons: Mapping from row to the reason why the image cannot be read, for the first thousand such rows.
    """

    missing: NDArray[np.bool_]
    unreadable: NDArray[np.bool_]
    tiny: NDArray[np.bool_]
    misnamed: NDArray[np.bool_]
    kind: NDArray[np.uint8]
    digest: NDArray[np.uint64]
    reasons: dict[int, str]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """(n,) bool, whether the image can be read."""
        return ~(self.missing | self.unreadable)

    def kind_of(self, row: int) -> str:
        """Returns the format of a readable image."""
        return _KINDS[int(self.kind[row])]


def survey(table: AnnotationTable) -> Survey:
    """Reads every image file of a table once, to hash its content, parse its header and check that it is complete.

    If the header and the end of a file are correct, damage in between is not detected.

    Args:
        table: Table of the images. The result needs about 30 bytes per image.
    """
    n = len(table)
    flags = np.zeros((4, n), dtype=bool)
    missing, unreadable, tiny, misnamed = flags
    kind, digest = np.zeros(n, np.uint8), np.zeros((n, _DIGEST // 8), np.uint64)
    reasons: dict[int, str] = {}
    missing[table.missing_rows()] = True
    rows = np.flatnonzero(~missing)
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(rows), desc="Images", leave=False, delay=1) as bar:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK].tolist()
            for row, (content, found) in zip(chunk, pool.map(_examine, map(table.file, chunk)), strict=True):
                bar.update()
                if isinstance(found, str):
                    unreadable[row] = True
                    if len(reasons) < _REASONS:
                        reasons[row] = found
                    continue
                digest[row] = np.frombuffer(content, np.uint64)
                kind[row] = _KINDS.index(found.kind)
                tiny[row] = min(found.width, found.height) < SMALLEST
                misnamed[row] = _is_misnamed(str(table.paths[row]), found.kind)
    return Survey(missing, unreadable, tiny, misnamed, kind, digest, reasons)


def equal_rows(digest: NDArray[np.uint64], rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Groups rows whose digests are equal.

    Args:
        digest: Hashes (n, 2) of all files.
        rows: Rows (m,) to compare.

    Returns:
        Groups of at least two rows in ascending order. The groups are ordered by their first rows.
    """
    rows = rows[np.lexsort(digest[rows].T)]  # the sort is stable, so the rows of a group stay in order
    same = (digest[rows[1:]] == digest[rows[:-1]]).all(axis=1)
    before, after = np.append(False, same)[: len(rows)], np.append(same, False)[: len(rows)]
    members = rows[before | after]  # excludes groups of one row early, to save memory
    if not len(members):
        return []
    starts = np.flatnonzero(~before[before | after])
    return sorted(np.split(members, starts[1:]), key=lambda group: int(group[0]))


def _examine(file: Path) -> tuple[bytes, Header | str]:
    """Returns a hash of the content, and the header or the reason why the image cannot be read."""
    content, header = b"", None
    try:
        with open_image(file) as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=_DIGEST)).digest()
            header = read_header(stream, file)
    except Exception:  # noqa: S110 - any exception can occur here; decode() below reports it as a DataError
        pass
    if header is None or not header.whole:
        try:
            decode(file)
        except DataError as error:
            return content, str(error)
    return content, header or f"{file}: the file was changed while it was being read; start again"


def _is_misnamed(path: str, kind: str) -> bool:
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix in _SUFFIXES[kind].split():
        return False
    return any(suffix in suffixes.split() for suffixes in _SUFFIXES.values()) or foreign_kind(path) is not None
