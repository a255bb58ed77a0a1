"""RunLogger, a version of Lightning's CSVLogger that continues the file of a resumed run."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from cbsa_lightning import lightning_private
from cbsa_lightning.errors import DataError, OutputError
from cbsa_lightning.io.files import replacing, writing
from cbsa_lightning.io.runs import METRICS, next_version, rank


class MetricsFile:
    """Writes ``metrics.csv`` of a run, with one row per logged set of metrics; every write is atomic.

    When a resumed run logs metrics for the first time, the rows of later steps are deleted, since the run logs them
    again. A row of the same step is replaced if it contains one of the logged metrics.

    Args:
        folder: Folder of the run.

    Raises:
        DataError: If the file exists but is not a table of metrics.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / METRICS
        self.hparams: dict[str, Any] = {}
        self.metrics = self._read()
        self._opened_again = bool(self.metrics)
        self._earlier = len(self.metrics)  # rows read from the file
        self._logged = self._new_hparams = False

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        try:
            with self.file.open(newline="", encoding="utf-8") as stream:
                rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]
            return [{**row, "step": int(row["step"])} for row in rows]
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise DataError(
                f"{self.file} is not a table of metrics with a column named 'step' ({error}). Move the "
                "file out of the run's folder"
            ) from error

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Adds a row, or replaces a row from before resuming that has the same step and one of the metrics."""
        self._logged = True
        if self._opened_again:
            self.metrics = [row for row in self.metrics if row["step"] <= step]
            self._earlier = len(self.metrics)
            self._opened_again = False
        new = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        new["step"] = step
        for i in range(self._earlier - 1, -1, -1):
            if self.metrics[i]["step"] < step:
                break
            if self.metrics[i]["step"] == step and self.metrics[i].keys() & new.keys() - {"step", "epoch"}:
                self.metrics[i] = new
                return
        self.metrics.append(new)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Stores hyperparameters for ``hparams.yaml``."""
        self.hparams.update(params)
        self._new_hparams = True

    def save(self) -> None:
        """Writes both files if anything was logged. A run that cannot be resumed therefore leaves them unchanged."""
        if not self._logged:
            return
        if self._new_hparams and self.hparams:
            with replacing(self.folder / "hparams.yaml") as draft:
                save_hparams_to_yaml(str(draft), self.hparams)
            self._new_hparams = False
        with replacing(self.file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, sorted(set().union(*self.metrics)))
            writer.writeheader()
            writer.writerows(self.metrics)


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, which continues an existing ``metrics.csv`` instead of deleting it.

    The folder of a new run is created when its version is first requested, so that no other process uses it.
    """

    @property
    def version(self) -> int | str:
        """The given version or the next unused one."""
        if self._version is None and rank() == 0:
            self._version = int(next_version(Path(self.root_dir)).name.removeprefix("version_"))
        return super().version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The metrics file, which exists only on the first process."""
        if self._experiment is None:
            folder = Path(self.log_dir)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._experiment = MetricsFile(folder)  # type: ignore[assignment]
        return self._experiment

    def finalize(self, status: str) -> None:
        """Writes the file. If this fails after the run itself has failed, only a warning is issued."""
        try:
            super().finalize(status)
        except OutputError as error:
            if status == "success":
                raise
            rank_zero_warn(str(error))


_BEGUN: WeakSet[Any] = WeakSet()  # W&B runs that this process has started


def begin_wandb_runs(loggers: Iterable[Logger]) -> None:
    """Starts a separate W&B run for each new ``WandbLogger``; Lightning would continue the run of an earlier training.

    If the user has started a run with ``wandb.init``, for example in a sweep, that run is used.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not lightning_private.has_begun(logger) and rank() == 0:
            import wandb

            if wandb.run in _BEGUN:
                wandb.finish()
            if wandb.run is None:
                _BEGUN.add(logger.experiment)


def going_on(logger: Logger, folder: Path) -> Logger:
    """Returns a copy of a :class:`RunLogger` that continues in the run's folder; returns other loggers unchanged."""
    if isinstance(logger, TensorBoardLogger):
        lightning_private.log_into(logger, folder)
    if not isinstance(logger, CSVLogger):
        return logger
    return RunLogger(str(folder.parent), "", folder.name, *lightning_private.csv_settings(logger))
