"""Interface that a custom data module must implement for semi-supervised training."""

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

    The report of a run also needs ``eval_table()`` and ``image_size``. Predictions also need ``predict_table()``.

    Attributes:
        train_table: The n training images.
        split: The labeled and unlabeled rows of this table.
    """

    train_table: AnnotationTable
    split: Split

    def train_dataloader(self) -> Iterable[TrainBatch]:
        """Returns strong views. Lightning calls it again after the warm-up, which uses only labeled images."""

    def val_dataloader(self) -> Iterable[EvalBatch]:
        """Returns plain views of the validation images."""

    def weak_dataloader(self, epoch: int) -> Iterable[EvalBatch]:
        """Returns weak views of this rank's part of the images with unknown labels (unlabeled or partly labeled)."""

    def plain_dataloader(self, rows: np.ndarray) -> Iterable[EvalBatch]:
        """Returns plain views of this rank's part of the given rows of ``train_table``."""

    def labeled_targets(self) -> Tensor:
        """Returns the labels ``(n_labeled, C)`` of the labeled rows, in {1, 0, -1 unknown}."""

    def hidden_targets(self) -> Tensor:
        """Returns the hidden labels ``(n, C)`` of the n images with unknown labels. They are used only for metrics.

        Labels that are not hidden are -1. The order is that of
        :class:`~cbsa_lightning.data.incomplete.IncompleteImages`: first unlabeled, then partly labeled images.
        """


_NAMES = [*SemiSupervisedData.__annotations__, *(name for name in vars(SemiSupervisedData) if name[0] != "_")]


def semi_supervised(data: Any) -> SemiSupervisedData:
    """Returns ``data`` if it implements :class:`SemiSupervisedData`.

    Raises:
        ConfigError: If it does not implement it. The message names what is missing.
    """
    missing = [name for name in _NAMES if not hasattr(data, name)]
    if data is None or missing:
        what = "training was started with only loaders" if data is None else f"{type(data).__name__} lacks {missing}"
        raise ConfigError(
            f"Training needs a data module, but {what}. Pass datamodule=SSMLLDataModule(...), or a custom data module "
            "that implements cbsa_lightning.data.protocol.SemiSupervisedData."
        )
    return data  # type: ignore[no-any-return]
