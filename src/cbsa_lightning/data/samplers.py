"""Batch samplers whose order is a function of (seed, epoch, pass) and of nothing else.

Each yields lists of :class:`Draw`, which tell a data set the image, the epoch, and how often the image has already
occurred in it: everything that the randomness of its views depends on. Workers, ranks and restarts therefore change
nothing. Every rank builds the same global batch and keeps every ``world_size``-th draw of it.
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
        epoch: Epoch that the sampler is in.
        visit: How many times this image came before in this epoch: 0 the first time, 1 the second.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a draw
    epoch: int
    visit: int


class _Batches(Sampler[list[Draw]]):
    """What the samplers of this file share: the epoch, and this process's place among the ranks."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}; give an integer of 0 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} does not fit world_size {world_size}: ranks are 0 to world_size - 1")
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self._skipped = 0

    @property
    def sampler(self) -> Self:
        """This object: Lightning calls ``set_epoch`` on ``dataloader.batch_sampler.sampler``."""
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
        """Every index once, in the order that (seed, stream, epoch, visit) gives."""
        # spawn_key, not one flat list: SeedSequence takes [1] and [1, 0] for the same entropy.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, epoch, visit)))
        return _draws(rng.permutation(indices), epoch, visit)

    def _passes(self, indices: np.ndarray, stream: int, epoch: int) -> Iterator[Draw]:
        """Pass after pass without end, each in an order of its own."""
        for visit in count():
            yield from self._pass(indices, stream, epoch, visit)

    def _share(self, draws: Sequence[Draw]) -> list[Draw]:
        """This rank's part of a global batch."""
        return list(draws[self.rank :: self.world_size])


class LabeledBatches(_Batches):
    """Shuffled batches of labeled images: one pass, or as many batches as asked for.

    Args:
        labeled: Rows of the labeled images, (n,) integers.
        batch_size: Images in a global batch, over all ranks together.
        seed: Seed of the order.
        num_batches: Batches an epoch. ``None`` is one pass, whose last batch may be smaller. A number gives
            full batches and starts a freshly permuted pass each time the images are used up.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: No labeled images, a size below 1, or a batch that would leave a rank without images.
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
        """Batches an epoch, the same on all ranks."""
        return self.num_batches or -(-len(self.labeled) // self.batch_size)

    def _batches(self) -> Iterator[list[Draw]]:
        if self.num_batches is None:
            draws = self._pass(self.labeled, _LABELED, self.epoch, visit=0)
        else:
            draws = self._passes(self.labeled, _LABELED, self.epoch)
        for _ in range(len(self)):
            yield self._share(_take(draws, self.batch_size))


class PairedBatches(_Batches):
    """Shuffled passes over the unlabeled images, one by default, each batch led by labeled images that cycle.

    The last batch of a single pass may have fewer unlabeled images; its labeled part is full. The labeled images are
    reshuffled for each of their passes.

    Args:
        labeled: Rows of the labeled images, (n,) integers.
        unlabeled: Rows of the unlabeled images, (m,) integers.
        labeled_per_batch: Labeled images in a global batch, over all ranks together; may exceed n.
        unlabeled_per_batch: Unlabeled images in a global batch, over all ranks together.
        seed: Seed of both orders.
        num_batches: Batches an epoch; see :class:`LabeledBatches`.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: No labeled or no unlabeled images, a size below 1, or a batch that would leave a rank
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
        """Batches an epoch, the same on all ranks."""
        return self.num_batches or -(-len(self.unlabeled) // self.unlabeled_per_batch)

    def _batches(self) -> Iterator[list[Draw]]:
        """Labeled draws first, then unlabeled ones."""
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
    """Every image once, in the given order, never padded: for evaluation and for scoring weak views.

    Rank r has items r, r + world_size, ...: shards may differ by one image, so ranks may differ by one
    batch. Whoever gathers them must therefore not count on equally many batches.

    Args:
        indices: Rows of the images, (n,) integers.
        batch_size: Images in a batch of this process.
        rank: Rank of this process.
        world_size: Number of processes.
        epoch: Epoch in the draws until :meth:`set_epoch` is called.

    Raises:
        ConfigError: No images over all ranks, or a size below 1.
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
        """Batches on this rank."""
        return -(-len(self.indices) // self.batch_size)

    def _batches(self) -> Iterator[list[Draw]]:
        draws = _draws(self.indices, self.epoch, visit=0)
        for _ in range(len(self)):
            yield _take(draws, self.batch_size)


def _draws(order: np.ndarray, epoch: int, visit: int) -> Iterator[Draw]:
    """The draws of one pass, made as they are asked for: as Python objects, all would take many times their room."""
    return (Draw(index, epoch, visit) for block in blocks(order) for index in block.tolist())


def _take(draws: Iterator[Draw], number: int) -> list[Draw]:
    return list(islice(draws, number))


def _size_of_last(total: int, size: int) -> int:
    return total % size or size


def _rows(indices: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.size == 0:
        raise ConfigError(f"there are no {what} images: check the data set and the share that is labeled")
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
    # A rank without images would sit out a step that the others wait for.
    if served < world_size:
        raise ConfigError(
            f"a batch of {size} images leaves {world_size - served} of {world_size} processes without any; "
            "choose another batch size (the last batch holds what is left over), or fewer processes"
        )
