"""RunLogger: Lightning's CSVLogger, with a file that goes on where a resumed run goes on."""

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
    """``metrics.csv`` of a run, a row for each time that metrics were logged; at any time whole on the disk.

    Opened again, it drops the rows of later steps than the first one that is logged now: the part of the run that was
    cut off wrote them, and the resumed run writes them again. A row that was there, of the same step and with a name in
    common, is replaced.

    Args:
        folder: Folder of the run.

    Raises:
        DataError: If there is a file that is no such table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / METRICS
        self.hparams: dict[str, Any] = {}
        self.metrics = self._read()
        self._opened_again = bool(self.metrics)
        self._earlier = len(self.metrics)  # rows that were read from the file
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
                f"{self.file}: is no table of metrics with a column step ({error}); move it out of the run's folder"
            ) from error

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Adds a row, or replaces the one that it repeats."""
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
        """Keeps them for ``hparams.yaml``."""
        self.hparams.update(params)
        self._new_hparams = True

    def save(self) -> None:
        """Writes both files once something was logged: a resumed run that is refused leaves them as they are."""
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
    """Lightning's CSVLogger; but in a folder that has a ``metrics.csv`` already it goes on, instead of deleting it.

    The folder of a new run is created when its version is first requested, so that no other process takes it.
    """

    @property
    def version(self) -> int | str:
        """The version that was given, else the next free one."""
        if self._version is None and rank() == 0:
            self._version = int(next_version(Path(self.root_dir)).name.removeprefix("version_"))
        return super().version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The file, for the first process."""
        if self._experiment is None:
            folder = Path(self.log_dir)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._experiment = MetricsFile(folder)  # type: ignore[assignment]
        return self._experiment

    def finalize(self, status: str) -> None:
        """Writes the file; where a run has failed and this fails too, the error stays that of the run."""
        try:
            super().finalize(status)
        except OutputError as error:
            if status == "success":
                raise
            rank_zero_warn(str(error))


_BEGUN: WeakSet[Any] = WeakSet()  # runs at W&B that trainings of this process began


def begin_wandb_runs(loggers: Iterable[Logger]) -> None:
    """Gives each new ``WandbLogger`` a run of its own, where Lightning would go on in that of the training before.

    A run that the user began with ``wandb.init``, as in a sweep, is used as it is.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not lightning_private.has_begun(logger) and rank() == 0:
            import wandb

            if wandb.run in _BEGUN:
                wandb.finish()
            if wandb.run is None:
                _BEGUN.add(logger.experiment)


def going_on(logger: Logger, folder: Path) -> Logger:
    """In the place of a run's logger, one that goes on in the run's folder; other loggers have their own way."""
    if isinstance(logger, TensorBoardLogger):
        lightning_private.log_into(logger, folder)
    if not isinstance(logger, CSVLogger):
        return logger
    return RunLogger(str(folder.parent), "", folder.name, *lightning_private.csv_settings(logger))
