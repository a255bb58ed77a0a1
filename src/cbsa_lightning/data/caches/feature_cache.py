"""The class `FeatureCache`, which stores frozen features of images on disk.

With a cache, the images are needed only in the first epoch. Thresholds and validation use only the plain view or its
mirror image, so caching these views is exact. Strong views differ in every epoch, so replacing them with a few cached
views per image is an approximation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cbsa_lightning.arguments import check_number, check_paths
from cbsa_lightning.data.augmentations import Augmentation
from cbsa_lightning.data.caches.image_cache import Images
from cbsa_lightning.data.caches.store import KEY_BYTES, RowStore
from cbsa_lightning.data.needed_views import MIRRORED, PLAIN, STRONG
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.views import PlainView, StrongView, squash
from cbsa_lightning.errors import DataError

_FORMAT = 1  # increment it when the computation of features, views or keys changes
# Seed of the cached strong views. It is independent of the seed of a run, so that all runs share these views.
_BANK_SEED = 0
_VIEWS_AT_ONCE = 64


@dataclass(frozen=True)
class FeatureCache:
    """Cache of the features of the frozen tower in float16, which need 0.2 MB per view for RN50 at 224 pixels.

    The key of a row contains the weights of the tower, the content of the image file, the view, its settings and the
    precision of the computation. If one of them changes, the features are computed again.

    Args:
        folder: Folder of the cache. Use a local disk, and one folder for all data sets.
        strong_views: Number of cached strong views per training image. With 0, each training step computes new views
            and their frozen features. With m, training cycles through m views. This is an approximation that avoids
            decoding, augmentation and the tower, so that training without a GPU becomes practical.
        limit_gb: Maximum size of the features of one tower, in GB (10^9 bytes).

    Raises:
        ConfigError: If an argument has the wrong type or is negative.
    """

    folder: str = "cache"
    strong_views: int = 0
    limit_gb: float = 50.0

    def __post_init__(self) -> None:
        check_paths(**{"feature_cache.folder": self.folder})
        check_number("feature_cache.strong_views", self.strong_views, 0, whole=True)
        check_number("feature_cache.limit_gb", self.limit_gb, 0)

    def open(self, tower: Tower, image_size: int, at_least: int | None) -> RowStore:
        """Opens the store for the features of a tower at one image size."""
        settings = {
            "kind": "features",
            "version": _FORMAT,
            "weights": tower.weights,
            "precision": tower.precision,
            "image_size": image_size,
            "at_least": at_least,
        }
        name = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
        shape = tuple(tower.features(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)).shape[1:])
        return RowStore(Path(self.folder) / f"features-{name}", shape, np.float16, settings, "features")


@dataclass(frozen=True)
class Tower:
    """A frozen tower, with the properties that the cache needs.

    Attributes:
        features: Function that computes features ``(V, ...)`` of uint8 views ``(V, 3, S, S)``.
        weights: Fingerprint of everything that the features depend on except the views.
        precision: Lightning's name of the precision of the computation.
    """

    features: Callable[[Tensor], Tensor]
    weights: str
    precision: str

    def same_as(self, other: Tower) -> bool:
        """Returns whether both towers compute the same features."""
        return (self.weights, self.precision) == (other.weights, other.precision)


@dataclass(frozen=True)
class Features:
    """The computed features of a data set.

    Attributes:
        tower: The tower that computed the features.
        store: Store of the features.
        rows: Rows of the store ``(n, V)`` for each part of the data set. They are -1 for views that are not cached.
    """

    tower: Tower
    store: RowStore
    rows: dict[str, np.ndarray]


class CachedViews:
    """Cached features of the views of a table's images.

    Args:
        store: Store of the features.
        rows: Rows of the store ``(n, V)``, or -1 for views that are not cached.
        column: Function that maps a draw to one of the V views.
    """

    def __init__(self, store: RowStore, rows: np.ndarray, column: Callable[[Draw], int]) -> None:
        self.store, self.rows, self.column = store, rows, column

    def __call__(self, draw: Draw) -> Tensor:
        """Returns the float16 features of the view of a draw."""
        row = int(self.rows[draw.index, int(self.column(draw))])
        if row < 0:  # -1 would select the last row of the store
            raise DataError(
                f"The features of image {draw.index}, view {int(self.column(draw))}, have not been computed."
            )
        return torch.from_numpy(self.store[row].copy())


def plain(draw: Draw) -> int:
    """Returns the column of the plain view."""
    return PLAIN


@dataclass(frozen=True)
class StrongInTurn:
    """Selects one of ``number`` strong views in turn, depending on the epoch and the visit."""

    number: int

    def __call__(self, draw: Draw) -> int:
        """Returns the column of the view for a draw."""
        return STRONG + (draw.index + draw.epoch + draw.visit) % self.number


class KeptViews:
    """Cached views of n images, with their keys and their computation.

    Args:
        images: The n images.
        contents: Hash of the content of each image file.
        needed: ``(n, V)`` bool, whether each view of each image is needed; see :func:`needed_views`.
        size: S, the side of the views in pixels.
        strong: Augmentation of the strong views.
    """

    def __init__(
        self, images: Images, contents: Sequence[bytes], needed: np.ndarray, size: int, strong: Augmentation
    ) -> None:
        self.images, self.contents, self.needed = images, contents, needed
        self.plain, self.strong = PlainView(size), StrongView(size, _BANK_SEED, strong)
        names = ["plain", "mirrored", *(f"strong {v}, {strong.name}" for v in range(needed.shape[1] - STRONG))]
        self._names = [name.encode() for name in names]

    def key(self, row: int, column: int) -> bytes:
        """Returns the key of a view, which depends on the content of the file and the settings of the view."""
        return hashlib.blake2b(self.contents[row] + self._names[column], digest_size=KEY_BYTES).digest()

    def rows(self, store: RowStore) -> np.ndarray:
        """Returns rows of the store ``(n, V)``, int64. They are -1 for views that are not needed or missing."""
        places = np.argwhere(self.needed)
        rows = np.full(self.needed.shape, -1, np.int64)
        rows[self.needed] = store.find([self.key(row, column) for row, column in places.tolist()])
        return rows

    def make(self, row: int, columns: Sequence[int]) -> Tensor:
        """Computes the given views of one image, ``(len(columns), 3, S, S)`` uint8."""
        # Resizing first gives the same views, and a large photo is resized only once.
        image = squash(self.images[row], self.plain.size)
        # The random state depends on the content, not on the row, so that a file has the same views in all tables.
        place = int.from_bytes(self.contents[row][:4], "little")
        plain = self.plain(image)
        made = {PLAIN: lambda: plain, MIRRORED: lambda: plain.flip(-1)}
        return torch.stack(
            [made[c]() if c in made else self.strong(image, Draw(place, c - STRONG, 0)) for c in columns]
        )


Work = tuple[int, list[int]]  # an image and the columns of its views to compute


class _Missing(Dataset[Tensor]):
    """Data set of the missing views. All missing views of an image are one item, so that it is decoded once."""

    def __init__(self, views: KeptViews, work: list[Work]) -> None:
        self.views, self.work = views, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, i: int) -> Tensor:
        return self.views.make(*self.work[i])


def fill(
    store: RowStore,
    tower: Tower,
    tables: Sequence[KeptViews],
    limit_gb: float,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    show: bool = True,
) -> None:
    """Computes and stores missing features. Several processes may call this at once to divide the work.

    Args:
        store: Store of the features.
        tower: The tower that computes the features.
        tables: The views that are needed.
        limit_gb: Maximum size of the store in GB (10^9 bytes).
        num_workers: Number of processes that decode and augment images.
        rank: Rank of this process, which processes the rows ``rank``, ``rank + world_size``, and so on.
        world_size: Number of processes.
        show: Whether the process of rank 0 shows a progress bar.

    Raises:
        ConfigError: If the store would exceed its limit or the free disk space.
        DataError: If an image cannot be read or features are not finite in float16.
    """
    absent = [views.needed & (views.rows(store) < 0) for views in tables]
    store.require_room(
        int(sum(missing.sum() for missing in absent)),
        limit_gb,
        "Keep fewer strong views, raise data.feature_cache.limit_gb, choose another folder, or omit feature_cache.",
    )
    # The work is divided by row, not by position among the missing rows, because other processes may have added some.
    shares = [rows[rows % world_size == rank] for rows in (np.flatnonzero(missing.any(1)) for missing in absent)]
    total = sum(map(len, shares))
    hidden = not show or rank > 0 or not total
    with tqdm(total=total, desc="Frozen features", unit="image", leave=False, disable=hidden) as bar:
        for views, missing, rows in zip(tables, absent, shares, strict=True):
            work = [(row, np.flatnonzero(missing[row]).tolist()) for row in rows.tolist()]
            for keys, images in _batches(views, work, num_workers):
                features = tower.features(images).to("cpu", torch.float16)
                if not bool(features.isfinite().all()):
                    raise DataError(
                        "The features of the frozen tower overflow float16 and cannot be cached; omit feature_cache. "
                        "The weights may be damaged, or image_mean and image_std may differ from those of pretraining."
                    )
                store.append(keys, features.numpy())
                bar.update(_images_at_once(views))


def _batches(views: KeptViews, work: list[Work], num_workers: int) -> Iterator[tuple[list[bytes], Tensor]]:
    """Yields the keys and the views ``(V, 3, S, S)`` of several images at a time."""
    if not work:
        return
    loader = DataLoader(
        _Missing(views, work),
        batch_size=_images_at_once(views),
        num_workers=num_workers,
        collate_fn=torch.cat,
        generator=torch.Generator(),  # otherwise, the loader would advance the global random state
    )
    places = ((row, column) for row, columns in work for column in columns)
    for images in loader:
        yield [views.key(*next(places)) for _ in images], images


def _images_at_once(views: KeptViews) -> int:
    number: int = views.needed.shape[1]
    return max(1, _VIEWS_AT_ONCE // number)
