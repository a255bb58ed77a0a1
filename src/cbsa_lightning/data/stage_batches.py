"""Composition of the batches in both stages of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.batch_sizes import labeled_only_steps, steps_per_epoch
from cbsa_lightning.data.plan import NOTHING_UNKNOWN
from cbsa_lightning.data.samplers import LabeledBatches, PairedBatches
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import DataError


@dataclass(frozen=True)
class StageBatches:
    """Batches of the rows of a split, for one process of a run.

    Attributes:
        split: Rows of the training table.
        partly: Labeled rows with unknown labels.
        batch_size: Number of images per step of the semi-supervised stage.
        labeled_per_batch: Number of labeled images among them.
        warmup_batch_size: Number of images per step if only labeled images are used.
        min_steps_per_epoch: Minimum number of steps per epoch. Small data sets then need several passes.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    split: Split
    partly: NDArray[np.int64]
    batch_size: int
    labeled_per_batch: int
    warmup_batch_size: int
    min_steps_per_epoch: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def unlabeled_per_batch(self) -> int:
        """Number of unlabeled images per step of the semi-supervised stage."""
        return self.batch_size - self.labeled_per_batch

    def warm_up(self) -> LabeledBatches:
        """Returns the batches of the warm-up, which is one pass over the labeled images."""
        steps = self._more_than_a_pass(len(self.split.labeled), self.warmup_batch_size)
        return self._labeled(self.warmup_batch_size, steps)

    def labeled_only(self) -> LabeledBatches:
        """Returns the batches of a second stage that ignores unlabeled images; see :func:`labeled_only_steps`."""
        steps = labeled_only_steps(
            len(self.split.labeled),
            len(self.split.unlabeled),
            len(self.partly),
            self.batch_size,
            self.labeled_per_batch,
            self.min_steps_per_epoch,
        )
        return self._labeled(self.warmup_batch_size, steps)

    def semi_supervised(self) -> PairedBatches | LabeledBatches:
        """Returns the batches of one pass over the unlabeled images. Each batch also contains labeled images.

        If there are no unlabeled images, it returns one pass over the labeled images, some of which have unknown
        labels.

        Raises:
            DataError: If all labels are known.
        """
        split = self.split
        if not len(split.unlabeled):
            if not len(self.partly):
                raise DataError(NOTHING_UNKNOWN)
            return self._labeled(self.batch_size, self._more_than_a_pass(len(split.labeled), self.batch_size))
        return PairedBatches(
            split.labeled,
            split.unlabeled,
            self.labeled_per_batch,
            self.unlabeled_per_batch,
            self.seed,
            self._more_than_a_pass(len(split.unlabeled), self.unlabeled_per_batch),
            self.rank,
            self.world_size,
        )

    def _labeled(self, batch_size: int, steps: int | None) -> LabeledBatches:
        return LabeledBatches(self.split.labeled, batch_size, self.seed, steps, self.rank, self.world_size)

    def _more_than_a_pass(self, images: int, batch_size: int) -> int | None:
        """Returns the number of steps per epoch, or None if one pass over the images is enough."""
        return self.min_steps_per_epoch if self.min_steps_per_epoch > steps_per_epoch(images, batch_size) else None
