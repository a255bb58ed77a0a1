"""The batches that go from the loaders to the training loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TrainBatch(NamedTuple):
    """Strong views, labeled images first.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, or None where ``features`` stand for them.
        targets: ``(B, C)`` int8 in {1, 0, -1}; all -1 for an image whose labels the run may not see.
        index: ``(B,)`` int64, row of each image in the train table.
        labeled: ``(B,)`` bool.
        features: What the frozen tower made of the images, ``(B, ...)`` float16 from a cache, or None.
    """

    images: Tensor | None
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    labeled: Tensor
    features: Tensor | None = None


class EvalBatch(NamedTuple):
    """Views without distortion, or weak views of unlabeled images.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, or None where ``features`` stand for them.
        targets: ``(B, C)`` int8 in {1, 0, -1}, for measuring only.
        index: ``(B,)`` int64, row of each image in its table.
        features: What the frozen tower made of the images, ``(B, ...)`` float16 from a cache, or None.
        unread: Rows of images that could not be read, and why; black images stand for them.
    """

    images: Tensor | None
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    features: Tensor | None = None
    unread: tuple[tuple[int, str], ...] = ()
