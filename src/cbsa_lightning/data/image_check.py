"""Detection of unreadable images before training, without decoding files that appear to be complete."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.images import decode, looks_whole
from cbsa_lightning.errors import DataError, listed

_THREADS = 8  # number of threads, which mostly wait for the disk
_CHUNK = 4096


def unreadable(table: AnnotationTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the rows among ``rows`` whose images cannot be read.

    The header and the end of each file are read. Files that do not appear to be complete are decoded. If the header and
    the end are correct, damage in between is not detected.

    Args:
        table: Table with the paths of the images.
        rows: ``(m,)``, the rows of the table to check.
    """
    bad: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(rows), desc="Checking images", leave=False, delay=1) as bar,
    ):
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            readable = list(pool.map(_readable, map(table.file, chunk.tolist())))
            bad.append(chunk[~np.array(readable, dtype=bool)])
            bar.update(len(chunk))
    return np.concatenate(bad)


def refuse_unreadable(parts: Iterable[tuple[AnnotationTable, NDArray[np.int64]]]) -> None:
    """Checks that all images can be read.

    Args:
        parts: Tables, each with the rows to check.

    Raises:
        DataError: If images cannot be read. The message names all their files.
    """
    found = [str(table.file(row)) for table, rows in parts for row in unreadable(table, rows).tolist()]
    if found:
        raise DataError(
            f"{len(found)} images cannot be read: {listed(found)}. Download or copy them again, or train without them: "
            "--data.on_error skip."
        )


def _readable(file: Path) -> bool:
    if looks_whole(file):
        return True
    try:
        decode(file)
    except DataError:
        return False
    return True
