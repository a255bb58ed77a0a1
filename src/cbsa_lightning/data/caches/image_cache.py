"""The class `ImageCache`, which stores resized images on disk, so that each file is decoded only once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cbsa_lightning.arguments import check_number, check_paths
from cbsa_lightning.data.caches.store import RowStore, content_keys
from cbsa_lightning.data.images import ImageFiles
from cbsa_lightning.data.views import squash

_FORMAT = 1  # increment it when the results of decode() or squash() change
_CHUNK = 64  # number of images that are written to disk at a time


class Images(Protocol):
    """The images of a table, indexed by row. They may be stored in any form."""

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns the image of a row, (H, W, 3) uint8, possibly read-only."""
        ...

    def select(self, rows: np.ndarray) -> Images:
        """Returns the images of these rows, in this order."""
        ...


@dataclass(frozen=True)
class ImageCache:
    """Cache of decoded and resized images, which need 3 S^2 bytes each (0.15 GB per 1,000 images of 224 pixels).

    Images are identified by the content of their files. A file that has been moved is therefore recognized, and a file
    that has been changed is decoded again. Views computed from the cache equal those computed from the files.

    Args:
        folder: Folder of the cache. Use a local disk, and one folder for all data sets.
        limit_gb: Maximum size of the cache for one image size, in GB (10^9 bytes).

    Raises:
        ConfigError: If an argument has the wrong type or the limit is negative.
    """

    folder: str = "cache"
    limit_gb: float = 50.0

    def __post_init__(self) -> None:
        check_paths(**{"image_cache.folder": self.folder})
        check_number("image_cache.limit_gb", self.limit_gb, 0)

    def images(
        self, files: ImageFiles, size: int, num_workers: int = 0, left_out: np.ndarray | None = None
    ) -> CachedImages:
        """Returns the images of a table. Images that are not cached are first decoded and stored.

        Several processes may call this at once.

        Args:
            files: The images.
            size: S, the side of the resized images in pixels.
            num_workers: Number of processes that decode images.
            left_out: Rows to omit because their files cannot be read.

        Raises:
            ConfigError: If the cache would exceed its limit or the free disk space, or contains other images.
            DataError: If a file cannot be read.
        """
        folder = Path(self.folder) / f"images-{size}{'' if files.at_least is None else '-fast'}"
        settings = {"kind": "images", "version": _FORMAT, "size": size, "at_least": files.at_least}
        store = RowStore(folder, (size, size, 3), np.uint8, settings, "decoded images")
        paths = [files.table.file(row) for row in range(len(files.table))]
        keys = content_keys(paths, Path(self.folder) / "contents.json")
        _fill(store, files, size, keys, self.limit_gb, num_workers, left_out)
        return CachedImages(store, store.find(keys))


class CachedImages:
    """The resized images of a table, indexed by row and read from a store.

    Args:
        store: Store of images (S, S, 3) uint8.
        numbers: ``(n,)`` integers, the row of each image in the store.
    """

    def __init__(self, store: RowStore, numbers: np.ndarray) -> None:
        self.store, self.numbers = store, numbers

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns the image of a row, (S, S, 3) uint8, read-only."""
        return self.store[self.numbers[row]]

    def select(self, rows: np.ndarray) -> CachedImages:
        """Returns the images of these rows, in this order."""
        return CachedImages(self.store, self.numbers[rows])


class _Squashed(Dataset[np.ndarray]):
    """Data set of the resized images in the given rows of a table."""

    def __init__(self, files: ImageFiles, rows: list[int], size: int) -> None:
        self.files, self.rows, self.size = files, rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return squash(self.files[self.rows[i]], self.size)


def _fill(
    store: RowStore,
    files: ImageFiles,
    size: int,
    keys: list[bytes],
    limit_gb: float,
    num_workers: int,
    left_out: np.ndarray | None,
) -> None:
    absent = store.find(keys) < 0
    if left_out is not None:
        absent[left_out] = False
    missing = {keys[row]: row for row in np.flatnonzero(absent).tolist()}  # files with equal content are decoded once
    if not missing:
        return
    store.require_room(
        len(missing), limit_gb, "Raise data.image_cache.limit_gb, choose another folder, or omit image_cache."
    )
    squashed = _Squashed(files, list(missing.values()), size)
    # Without a separate generator, the loader would advance the global random state and change the run.
    loader = DataLoader(squashed, batch_size=_CHUNK, num_workers=num_workers, generator=torch.Generator())
    new = iter(missing)
    with tqdm(total=len(missing), desc="Decoding images", leave=False) as bar:
        for rows in loader:
            store.append([next(new) for _ in rows], rows.numpy())
            bar.update(len(rows))
