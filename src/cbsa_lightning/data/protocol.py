"""The interface that a custom data module must implement for semi-supervised training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.batches import EvalBatch, TrainBatch
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import ConfigError


class SemiSupervisedData(Protocol):
    """A LightningDataModule that the training loop can use, such as :class:`SSMLLDataModule`.

    The report of a run also needs ``eval_table()`` and ``image_size``, and a table of predictions ``predict_table()``.

    Attributes:
        train_table: The n training images.
        split: Which of its rows are labeled and unlabeled.
    """

    train_table: AnnotationTable
    split: Split

    def train_dataloader(self) -> Iterable[TrainBatch]:
        """Returns strong views, only of labeled images during the warm-up. Called again when the warm-up ends."""

    def val_dataloader(self) -> Iterable[EvalBatch]:
        """Returns plain views of the images to validate on."""

    def weak_dataloader(self, epoch: int) -> Iterable[EvalBatch]:
        """Returns weak views of this rank's share of all images with unknown labels, unlabeled or partly labeled."""

    def plain_dataloader(self, rows: np.ndarray) -> Iterable[EvalBatch]:
        """Returns plain views of this rank's share of these rows of ``train_table``."""

    def labeled_targets(self) -> Tensor:
        """Returns the labels ``(n_labeled, C)`` of the labeled rows, in {1, 0, -1 unknown}."""

    def hidden_targets(self) -> Tensor:
        """Returns the true labels ``(n, C)`` of the n images with unknown labels, else -1; used only for metrics.

        They are in the order of :class:`~cbsa_lightning.data.incomplete.IncompleteImages`: unlabeled images, then
        partly labeled images.
        """


_NAMES = [*SemiSupervisedData.__annotations__, *(name for name in vars(SemiSupervisedData) if name[0] != "_")]


def semi_supervised(data: Any) -> SemiSupervisedData:
    """Returns ``data`` if it implements :class:`SemiSupervisedData`.

    Raises:
        ConfigError: If it does not. The message names what is missing.
    """
    missing = [name for name in _NAMES if not hasattr(data, name)]
    if data is None or missing:
        what = "training was started with only loaders" if data is None else f"{type(data).__name__} lacks {missing}"
        raise ConfigError(
            f"Training needs a data module, but {what}. Give datamodule=SSMLLDataModule(...), or a custom one that "
            "implements cbsa_lightning.data.protocol.SemiSupervisedData."
        )
    return data  # type: ignore[no-any-return]
