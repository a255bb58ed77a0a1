"""Batches passed from the loaders to the training loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TrainBatch(NamedTuple):
    """Strong views, labeled images first.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, or None if ``features`` replace them.
        targets: ``(B, C)`` int8 in {1, 0, -1}; all -1 for an image whose labels are hidden from the run.
        index: ``(B,)`` int64, row of each image in the train table.
        labeled: ``(B,)`` bool.
        features: Frozen features of the images, ``(B, ...)`` float16 from a cache, or None.
    """

    images: Tensor | None
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    labeled: Tensor
    features: Tensor | None = None


class EvalBatch(NamedTuple):
    """Plain views, or weak views of unlabeled images.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, or None if ``features`` replace them.
        targets: ``(B, C)`` int8 in {1, 0, -1}, only for metrics.
        index: ``(B,)`` int64, row of each image in its table.
        features: Frozen features of the images, ``(B, ...)`` float16 from a cache, or None.
        unread: Rows of images that could not be read, and the reasons; the batch contains black images for them.
    """

    images: Tensor | None
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    features: Tensor | None = None
    unread: tuple[tuple[int, str], ...] = ()
