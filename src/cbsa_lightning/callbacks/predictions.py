"""`cbsa predict`: labels and scores of images, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from numpy.typing import NDArray

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.predictions import check_output, in_table_order, write_predictions
from cbsa_lightning.runs import PREDICTIONS, folder_of


class WritePredictions(BasePredictionWriter):
    """Writes what ``cbsa predict`` finds, one row an image, in the order of the images.

    Args:
        output: File to write, .csv or .parquet; None: ``predictions.csv`` in the run's folder.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.output = output

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses an impossible output before the work, not after it.

        Raises:
            ConfigError: An output that exists or cannot be written, or a data module without ``predict_table``.
        """
        path = self._path(trainer)
        check_output(path, pl_module.class_names)
        if path.exists() and not trainer.fast_dev_run:
            raise ConfigError(f"{path} exists already. Give another --predictions.output, or move that file away.")
        if not hasattr(getattr(trainer, "datamodule", None), "predict_table"):
            raise ConfigError(
                "A table of predictions needs the images' names: call trainer.predict(module, "
                "datamodule=SSMLLDataModule(..., predict=FOLDER_OR_TABLE)), or leave WritePredictions out."
            )

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gathers the predictions of all processes; the first one writes them."""
        path = self._path(trainer)
        parts = gather([packed(output) for output in predictions])
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        data = trainer.datamodule
        table, class_names = data.predict_table(), pl_module.class_names
        write_predictions(path, table, class_names, *in_table_order(len(table), len(class_names), parts))
        print(f"Predictions of {len(table)} images: {path}")

    def _path(self, trainer: Any) -> Path:
        if self.output is not None:
            return Path(self.output)
        return (folder_of(trainer) or Path()) / PREDICTIONS  # without a folder nothing is written


Part = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def packed(output: dict[str, torch.Tensor]) -> Part:
    """Output of ``predict_step`` as numpy arrays: row, float32 scores and bool labels."""
    return (
        output["index"].cpu().numpy(),
        output["scores"].float().cpu().numpy().astype(np.float32),
        output["labels"].cpu().numpy(),
    )


def gather(parts: list[Any]) -> list[Any]:
    """The parts of all processes, on each of them; shards may differ in length."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return parts
    everyone: list[list[Any] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, parts)
    return [part for own in everyone if own for part in own]
