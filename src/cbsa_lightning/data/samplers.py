"""Batch samplers whose order depends only on (seed, epoch, pass).

Each sampler yields lists of :class:`Draw` objects. A draw contains the image, the epoch, and how often the image has
already occurred in this epoch. The random transform of a view depends only on the draw and the seed, so workers, ranks
and restarts do not affect it. Every rank generates the same global batch and keeps every ``world_size``-th draw of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple, Self

import numpy as np
from torch.utils.data import Sampler

from cbsa_lightning.data.annotations import blocks
from cbsa_lightning.errors import ConfigError

_LABELED, _UNLABELED = 0, 1  # identify independent random streams of the same seed


class Draw(NamedTuple):
    """An image that a sampler has drawn.

    Attributes:
        index: Row of the annotation table.
        epoch: Current epoch of the sampler.
        visit: Number of previous occurrences of the image in this epoch.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a draw
    epoch: int
    visit: int


class _Batches(Sampler[list[Draw]]):
    """Base class of the samplers, which manages the epoch and the rank of this process."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}, but must be an integer of at least 0")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is invalid for world_size {world_size}; ranks are 0 to world_size - 1")
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self._skipped = 0

    @property
    def sampler(self) -> Self:
        """Returns this object, since Lightning calls ``set_epoch`` on ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration. An iteration in progress keeps its epoch."""
        if epoch != self.epoch:
            self._skipped = 0
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Skips the first batches of the next iteration, which were processed before the run was resumed."""
        self._skipped = batches

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yields this rank's part of each batch."""
        skipped, self._skipped = self._skipped, 0
        yield from islice(self._batches(), skipped, None)

    def _batches(self) -> Iterator[list[Draw]]:
        raise NotImplementedError

    def _pass(self, indices: np.ndarray, stream: int, epoch: int, visit: int) -> Iterator[Draw]:
        """Yields every index once, in an order that is determined by (seed, stream, epoch, visit)."""
        # spawn_key is used instead of a flat list, because SeedSequence treats [1] and [1, 0] as the same entropy.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, epoch, visit)))
        return _draws(rng.permutation(indices), epoch, visit)

    def _passes(self, indices: np.ndarray, stream: int, epoch: int) -> Iterator[Draw]:
        """Yields passes without end, each in a different order."""
        for visit in count():
            yield from self._pass(indices, stream, epoch, visit)

    def _share(self, draws: Sequence[Draw]) -> list[Draw]:
        """Returns this rank's part of a global batch."""
        return list(draws[self.rank :: self.world_size])


class LabeledBatches(_Batches):
    """Shuffled batches of labeled images, for one pass or a given number of batches.

    Args:
        labeled: Rows of the labeled images, (n,) integers.
        batch_size: Number of images in a global batch, over all ranks together.
        seed: Seed of the order.
        num_batches: Number of batches per epoch. ``None`` yields one pass, whose last batch may be smaller. A number
            yields only full batches and starts another pass in random order each time the images are used up.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: If there are no labeled images, a size is below 1, or a rank would have no images in a batch.
    """

    def __init__(
        self,
        labeled: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        num_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed, rank, world_size)
        self.labeled = _rows(labeled, "labeled")
        self.batch_size = _at_least_one(batch_size, "batch_size")
        self.num_batches = None if num_batches is None else _at_least_one(num_batches, "num_batches")
        last = batch_size if num_batches is not None else _size_of_last(len(self.labeled), batch_size)
        _every_rank_has_one(min(last, world_size), last, world_size)

    def __len__(self) -> int:
        """Returns the number of batches per epoch, which is the same on all ranks."""
        return self.num_batches or -(-len(self.labeled) // self.batch_size)

    def _batches(self) -> Iterator[list[Draw]]:
        if self.num_batches is None:
            draws = self._pass(self.labeled, _LABELED, self.epoch, visit=0)
        else:
            draws = self._passes(self.labeled, _LABELED, self.epoch)
        for _ in range(len(self)):
            yield self._share(_take(draws, self.batch_size))


class PairedBatches(_Batches):
    """Shuffled batches of labeled and unlabeled images, for one pass over the unlabeled images by default.

    Each batch starts with the labeled images, which are repeated. They are reshuffled for each of their passes. The
    last batch of a single pass may contain fewer unlabeled images, but as many labeled ones as the other batches.

    Args:
        labeled: Rows of the labeled images, (n,) integers.
        unlabeled: Rows of the unlabeled images, (m,) integers.
        labeled_per_batch: Number of labeled images in a global batch, over all ranks together. It may exceed n.
        unlabeled_per_batch: Number of unlabeled images in a global batch, over all ranks together.
        seed: Seed of both orders.
        num_batches: Number of batches per epoch; see :class:`LabeledBatches`.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: If there are no labeled or no unlabeled images, a size is below 1, or a rank would have no images
            in a batch.
    """

    def __init__(
        self,
        labeled: Sequence[int] | np.ndarray,
        unlabeled: Sequence[int] | np.ndarray,
        labeled_per_batch: int,
        unlabeled_per_batch: int,
        seed: int,
        num_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed, rank, world_size)
        self.labeled = _rows(labeled, "labeled")
        self.unlabeled = _rows(unlabeled, "unlabeled")
        self.labeled_per_batch = _at_least_one(labeled_per_batch, "labeled_per_batch")
        self.unlabeled_per_batch = _at_least_one(unlabeled_per_batch, "unlabeled_per_batch")
        self.num_batches = None if num_batches is None else _at_least_one(num_batches, "num_batches")
        one_pass = num_batches is None
        last = _size_of_last(len(self.unlabeled), unlabeled_per_batch) if one_pass else unlabeled_per_batch
        served = min(max(labeled_per_batch, last), world_size)
        _every_rank_has_one(served, labeled_per_batch + last, world_size)

    def __len__(self) -> int:
        """Returns the number of batches per epoch, which is the same on all ranks."""
        return self.num_batches or -(-len(self.unlabeled) // self.unlabeled_per_batch)

    def _batches(self) -> Iterator[list[Draw]]:
        """Yields global batches, which start with the labeled draws."""
        labeled = self._passes(self.labeled, _LABELED, self.epoch)
        if self.num_batches is None:
            unlabeled = self._pass(self.unlabeled, _UNLABELED, self.epoch, visit=0)
        else:
            unlabeled = self._passes(self.unlabeled, _UNLABELED, self.epoch)
        for _ in range(len(self)):
            yield [
                *self._share(_take(labeled, self.labeled_per_batch)),
                *self._share(_take(unlabeled, self.unlabeled_per_batch)),
            ]


class InOrderBatches(_Batches):
    """Batches that contain every image once in the given order, without padding, for evaluation and scoring.

    Rank r has items r, r + world_size, and so on. The numbers of images on two ranks may differ by one, and hence the
    numbers of batches. Code that gathers the results must not assume equal numbers of batches.

    Args:
        indices: Rows of the images, (n,) integers.
        batch_size: Number of images in a batch of this process.
        rank: Rank of this process.
        world_size: Number of processes.
        epoch: Epoch of the draws until :meth:`set_epoch` is called.

    Raises:
        ConfigError: If there are no images on all ranks together, or a size is below 1.
    """

    def __init__(
        self,
        indices: Sequence[int] | np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
    ) -> None:
        super().__init__(0, rank, world_size)  # the seed is not used
        self.indices = _rows(indices, "evaluation")[rank::world_size]
        self.batch_size = _at_least_one(batch_size, "batch_size")
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches on this rank."""
        return -(-len(self.indices) // self.batch_size)

    def _batches(self) -> Iterator[list[Draw]]:
        draws = _draws(self.indices, self.epoch, visit=0)
        for _ in range(len(self)):
            yield _take(draws, self.batch_size)


def _draws(order: np.ndarray, epoch: int, visit: int) -> Iterator[Draw]:
    """Yields the draws of one pass lazily, to avoid the memory that all draws as Python objects would need."""
    return (Draw(index, epoch, visit) for block in blocks(order) for index in block.tolist())


def _take(draws: Iterator[Draw], number: int) -> list[Draw]:
    return list(islice(draws, number))


def _size_of_last(total: int, size: int) -> int:
    return total % size or size


def _rows(indices: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.size == 0:
        raise ConfigError(f"there are no {what} images; check the data set and the labeled fraction")
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ConfigError(
            f"{what} images must be given as a list of row numbers; found {rows.dtype} values of shape {rows.shape}"
        )
    return rows.astype(np.int64)


def _at_least_one(number: int, name: str) -> int:
    if number < 1:
        raise ConfigError(f"{name} is {number}, but must be at least 1")
    return number


def _every_rank_has_one(served: int, size: int, world_size: int) -> None:
    # The other ranks would wait forever for a rank that skips a step because it has no images.
    if served < world_size:
        raise ConfigError(
            f"a batch of {size} images leaves {world_size - served} of {world_size} processes without images; "
            "choose another batch size (the last batch contains the remaining images), or fewer processes"
        )
