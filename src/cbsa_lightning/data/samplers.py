"""Batch samplers whose order is a function of only (seed, epoch, pass).

Each sampler yields lists of :class:`Draw`, which contain the image, the epoch, and how often the image has already
occurred in it. The randomness of a view depends on nothing else, so workers, ranks and restarts do not change it. Every
rank builds the same global batch and keeps every ``world_size``-th draw of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple, Self

import numpy as np
from torch.utils.data import Sampler

from cbsa_lightning.data.annotations import blocks
from cbsa_lightning.errors import ConfigError

_LABELED, _UNLABELED = 0, 1  # separate random streams of one seed


class Draw(NamedTuple):
    """One image as drawn by a sampler.

    Attributes:
        index: Row of the annotation table.
        epoch: Current epoch of the sampler.
        visit: How many times the image occurred before in this epoch: 0 the first time, 1 the second.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a draw
    epoch: int
    visit: int


class _Batches(Sampler[list[Draw]]):
    """Base class of the samplers: the epoch, and this process's rank."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}; give an integer of 0 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} does not fit world_size {world_size}: ranks are 0 to world_size - 1")
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self._skipped = 0

    @property
    def sampler(self) -> Self:
        """Returns this object: Lightning calls ``set_epoch`` on ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration; an iteration in progress keeps its epoch."""
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
        """Yields every index once, in the order determined by (seed, stream, epoch, visit)."""
        # spawn_key instead of one flat list: SeedSequence treats [1] and [1, 0] as the same entropy.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, epoch, visit)))
        return _draws(rng.permutation(indices), epoch, visit)

    def _passes(self, indices: np.ndarray, stream: int, epoch: int) -> Iterator[Draw]:
        """Yields pass after pass without end, each in a different order."""
        for visit in count():
            yield from self._pass(indices, stream, epoch, visit)

    def _share(self, draws: Sequence[Draw]) -> list[Draw]:
        """Returns this rank's part of a global batch."""
        return list(draws[self.rank :: self.world_size])


class LabeledBatches(_Batches):
    """Shuffled batches of labeled images: one pass, or a given number of batches.

    Args:
        labeled: Rows of the labeled images, (n,) integers.
        batch_size: Images in a global batch, over all ranks together.
        seed: Seed of the order.
        num_batches: Batches per epoch. ``None`` yields one pass, whose last batch may be smaller. A number yields
            only full batches and starts another random pass each time the images are used up.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: If there are no labeled images, a size is below 1, or a batch would leave a rank without images.
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
        """Returns the batches per epoch, the same on all ranks."""
        return self.num_batches or -(-len(self.labeled) // self.batch_size)

    def _batches(self) -> Iterator[list[Draw]]:
        if self.num_batches is None:
            draws = self._pass(self.labeled, _LABELED, self.epoch, visit=0)
        else:
            draws = self._passes(self.labeled, _LABELED, self.epoch)
        for _ in range(len(self)):
            yield self._share(_take(draws, self.batch_size))


class PairedBatches(_Batches):
    """Shuffled passes over the unlabeled images, one by default; each batch starts with labeled images, which repeat.

    The last batch of a single pass may have fewer unlabeled images, but as many labeled ones as the others. The labeled
    images are reshuffled for each of their passes.

    Args:
        labeled: Rows of the labeled images, (n,) integers.
        unlabeled: Rows of the unlabeled images, (m,) integers.
        labeled_per_batch: Labeled images in a global batch, over all ranks together; may exceed n.
        unlabeled_per_batch: Unlabeled images in a global batch, over all ranks together.
        seed: Seed of both orders.
        num_batches: Batches per epoch; see :class:`LabeledBatches`.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: If there are no labeled or no unlabeled images, a size is below 1, or a batch would leave a rank
            without images.
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
        """Returns the batches per epoch, the same on all ranks."""
        return self.num_batches or -(-len(self.unlabeled) // self.unlabeled_per_batch)

    def _batches(self) -> Iterator[list[Draw]]:
        """Yields global batches, labeled draws first."""
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
    """Every image once in the given order, without padding, for evaluation and for scoring weak views.

    Rank r has items r, r + world_size, ..., so ranks may differ by one image and hence by one batch. Code that gathers
    their results must not assume equal numbers of batches.

    Args:
        indices: Rows of the images, (n,) integers.
        batch_size: Images in a batch of this process.
        rank: Rank of this process.
        world_size: Number of processes.
        epoch: Epoch of the draws until :meth:`set_epoch` is called.

    Raises:
        ConfigError: If there are no images over all ranks, or a size is below 1.
    """

    def __init__(
        self,
        indices: Sequence[int] | np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
    ) -> None:
        super().__init__(0, rank, world_size)  # nothing is random here
        self.indices = _rows(indices, "evaluation")[rank::world_size]
        self.batch_size = _at_least_one(batch_size, "batch_size")
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the batches on this rank."""
        return -(-len(self.indices) // self.batch_size)

    def _batches(self) -> Iterator[list[Draw]]:
        draws = _draws(self.indices, self.epoch, visit=0)
        for _ in range(len(self)):
            yield _take(draws, self.batch_size)


def _draws(order: np.ndarray, epoch: int, visit: int) -> Iterator[Draw]:
    """Yields the draws of one pass lazily, since all of them as Python objects would need much more memory."""
    return (Draw(index, epoch, visit) for block in blocks(order) for index in block.tolist())


def _take(draws: Iterator[Draw], number: int) -> list[Draw]:
    return list(islice(draws, number))


def _size_of_last(total: int, size: int) -> int:
    return total % size or size


def _rows(indices: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.size == 0:
        raise ConfigError(f"there are no {what} images: check the data set and the labeled fraction")
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ConfigError(
            f"{what} images must be given as one list of row numbers; found {rows.dtype} values of shape {rows.shape}"
        )
    return rows.astype(np.int64)


def _at_least_one(number: int, name: str) -> int:
    if number < 1:
        raise ConfigError(f"{name} is {number}; it must be 1 or more")
    return number


def _every_rank_has_one(served: int, size: int, world_size: int) -> None:
    # A rank without images would skip a step that the others wait for.
    if served < world_size:
        raise ConfigError(
            f"a batch of {size} images leaves {world_size - served} of {world_size} processes without any; "
            "choose another batch size (the last batch contains the remaining images), or fewer processes"
        )
