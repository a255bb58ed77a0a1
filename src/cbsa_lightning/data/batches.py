"""Batches that the loaders pass to the training loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TrainBatch(NamedTuple):
    """Strong views of labeled and unlabeled images, starting with the labeled ones.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, or None if ``features`` replace them.
        targets: ``(B, C)`` int8 in {1, 0, -1}. Labels that are hidden from the run are -1.
        index: ``(B,)`` int64, the row of each image in the training table.
        labeled: ``(B,)`` bool, whether an image is labeled.
        features: Cached frozen features of the images, ``(B, ...)`` float16, or None.
    """

    images: Tensor | None
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    labeled: Tensor
    features: Tensor | None = None


class EvalBatch(NamedTuple):
    """Plain views of images, or weak views of unlabeled images.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, or None if ``features`` replace them.
        targets: ``(B, C)`` int8 in {1, 0, -1}, used only for metrics.
        index: ``(B,)`` int64, the row of each image in its table.
        features: Cached frozen features of the images, ``(B, ...)`` float16, or None.
        unread: Rows of images that could not be read, with the reasons. The batch contains black images instead.
    """

    images: Tensor | None
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    features: Tensor | None = None
    unread: tuple[tuple[int, str], ...] = ()
