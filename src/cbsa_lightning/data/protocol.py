"""What a data module of one's own must offer for semi-supervised training."""

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
    """A LightningDataModule that the training loop can use; :class:`SSMLLDataModule` is one.

    A report of the run also needs ``eval_table()`` and ``image_size``, a table of predictions ``predict_table()``.

    Attributes:
        train_table: The n training images.
        split: Which of its rows are labeled and unlabeled.
    """

    train_table: AnnotationTable
    split: Split

    def train_dataloader(self) -> Iterable[TrainBatch]:
        """Strong views, of labeled images alone during the warm-up; asked for again when it ends."""

    def val_dataloader(self) -> Iterable[EvalBatch]:
        """Plain views of the images to measure on."""

    def weak_dataloader(self, epoch: int) -> Iterable[EvalBatch]:
        """Weak views of all images with unknown labels, unlabeled or partly labeled, each process its share."""

    def plain_dataloader(self, rows: np.ndarray) -> Iterable[EvalBatch]:
        """Plain views of these rows of ``train_table``, each process its share."""

    def labeled_targets(self) -> Tensor:
        """Labels ``(n_labeled, C)`` of the labeled rows, in {1, 0, -1 unknown}."""

    def hidden_targets(self) -> Tensor:
        """The true labels ``(n, C)`` of the n images with unknown labels; for figures only, -1 where there are none.

        Their order is that of :class:`~cbsa_lightning.data.incomplete.IncompleteImages`: unlabeled images, then partly
        labeled ones.
        """


_NAMES = [*SemiSupervisedData.__annotations__, *(name for name in vars(SemiSupervisedData) if name[0] != "_")]


def semi_supervised(data: Any) -> SemiSupervisedData:
    """Returns ``data`` if it offers what :class:`SemiSupervisedData` names.

    Raises:
        ConfigError: Naming what is missing.
    """
    missing = [name for name in _NAMES if not hasattr(data, name)]
    if data is None or missing:
        what = "training was started with loaders alone" if data is None else f"{type(data).__name__} lacks {missing}"
        raise ConfigError(
            f"Training needs a data module, but {what}. Give datamodule=SSMLLDataModule(...), or one of "
            "your own with all of cbsa_lightning.data.protocol.SemiSupervisedData."
        )
    return data  # type: ignore[no-any-return]
