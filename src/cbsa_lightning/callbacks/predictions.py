"""Writes the output of `cbsa predict`, a table of labels and scores of images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from cbsa_lightning.arguments import check_choice, check_paths
from cbsa_lightning.data.readers.unlabeled import by_suffix
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.inference.predictions import check_output, in_table_order, write_left_out, write_predictions
from cbsa_lightning.io.runs import PREDICTIONS, folder_of


class WritePredictions(BasePredictionWriter):
    """Writes the output of ``cbsa predict`` with one row per image, in the order of the images.

    Skipped files are listed in ``<output>_left_out.csv`` in the same folder. These are files in the input folder
    without an image suffix, and images that cannot be read.

    Args:
        output: Output file, .csv or .parquet. The default is ``predictions.csv`` in the run's folder.
        on_error: Specifies how to handle an image that cannot be read. "stop" writes the predictions so far and raises
            an error; "skip" continues with the other images.

    Attributes:
        unread: The rows of images that could not be read, with the reasons.
    """

    def __init__(self, output: str | None = None, on_error: Literal["stop", "skip"] = "stop") -> None:
        super().__init__(write_interval="batch_and_epoch")
        check_paths(**{"predictions.output": output})
        check_choice("predictions.on_error", on_error, ("stop", "skip"))
        self.output = output
        self.on_error = on_error
        self.unread: dict[int, str] = {}
        self._parts: list[Part] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Makes the loader continue after images that cannot be read."""
        self.unread, self._parts = {}, []
        if stage == "predict" and hasattr(trainer.datamodule, "gives_unread"):
            trainer.datamodule.gives_unread = True

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks the output file before predicting.

        Raises:
            ConfigError: If the output exists or cannot be written, or the data module has no ``predict_table``.
        """
        path = self._path(trainer)
        check_output(path, pl_module.class_names)
        for file in (path, self._listing(path)):
            if file.exists() and not trainer.fast_dev_run:
                raise ConfigError(f"{file} exists already. Choose another --predictions.output, or move the file.")
        if not hasattr(getattr(trainer, "datamodule", None), "predict_table"):
            raise ConfigError(
                "A table of predictions needs image names: call trainer.predict(module, "
                "datamodule=SSMLLDataModule(..., predict=FOLDER_OR_TABLE)), or remove WritePredictions."
            )
        if names := self._other_files(trainer):
            rank_zero_info(
                f"Skipped files whose suffix does not belong to a supported image format: {by_suffix(names)}."
            )

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Stores the predictions of the batch; if an image cannot be read, writes all predictions so far.

        Raises:
            DataError: If an image cannot be read and ``on_error`` is "stop".
        """
        unread = dict(prediction.get("unread", ()))
        self._parts.append(packed(prediction, without=unread))
        self.unread.update(unread)
        if unread and self.on_error == "stop":
            reason = next(iter(unread.values()))
            if trainer.fast_dev_run:
                raise DataError(f"{reason}.")
            path = self._path(trainer)
            if trainer.world_size > 1:  # the other processes write files of their own
                path = path.with_stem(f"{path.stem}_{trainer.global_rank}")
            count = self._write(trainer, pl_module, path, self._parts)
            raise DataError(
                f"{reason}. {path} contains the predictions of the {count} images before it. To skip unreadable "
                "images, set --predictions.on_error skip."
            )

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gathers the predictions of all processes; the first process writes them."""
        path = self._path(trainer)
        parts = gather(self._parts)
        self.unread = dict(gather(list(self.unread.items())))
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        count = self._write(trainer, pl_module, path, parts)
        print(f"Predictions of {count} images: {path}")
        names = self._other_files(trainer)
        table = trainer.datamodule.predict_table()
        left_out = [(name, "suffix of an unsupported format") for name in names]
        left_out += [(str(table.paths[row]), reason) for row, reason in sorted(self.unread.items())]
        if left_out:
            write_left_out(self._listing(path), left_out)
            counts = [by_suffix(names)] if names else []
            counts += [f"{len(self.unread)} unreadable"] if self.unread else []
            print(f"{len(left_out)} files were skipped ({', '.join(counts)}): {self._listing(path)}")

    def _write(self, trainer: Any, pl_module: Any, path: Path, parts: Sequence[Part]) -> int:
        """Writes the predictions of ``parts``, which cover the table except unread rows, and returns their number."""
        table, class_names = trainer.datamodule.predict_table(), pl_module.class_names
        missing = set(self.unread)
        if self.on_error == "stop" and missing:
            missing = set(range(len(table))).difference(*(part[0].tolist() for part in parts))
        scores, labels = in_table_order(len(table), len(class_names), parts, missing)
        rows = np.delete(np.arange(len(table)), sorted(missing))
        write_predictions(path, table.select(rows), class_names, scores[rows], labels[rows])
        return len(rows)

    @staticmethod
    def _other_files(trainer: Any) -> list[str]:
        return getattr(trainer.datamodule, "predict_left_out", list)()

    @staticmethod
    def _listing(path: Path) -> Path:
        return path.with_name(f"{path.stem}_left_out.csv")

    def _path(self, trainer: Any) -> Path:
        if self.output is not None:
            return Path(self.output)
        return (folder_of(trainer) or Path()) / PREDICTIONS  # without a folder, no file is written


Part = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def packed(output: dict[str, Any], without: Collection[int] = ()) -> Part:
    """Converts the output of ``predict_step`` to arrays (row, float32 scores, bool labels), except rows ``without``."""
    index = output["index"].cpu().numpy()
    kept = ~np.isin(index, list(without))
    scores = output["scores"].float().cpu().numpy().astype(np.float32)
    return index[kept], scores[kept], output["labels"].cpu().numpy()[kept]


def gather(parts: list[Any]) -> list[Any]:
    """Gathers the parts of all processes on each process; the numbers of parts may differ."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return parts
    everyone: list[list[Any] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, parts)
    return [part for own in everyone if own for part in own]
