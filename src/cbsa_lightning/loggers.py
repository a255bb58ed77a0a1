"""RunLogger: Lightning's CSVLogger, with a file that goes on where a resumed run goes on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn

from cbsa_lightning.errors import DataError, OutputError
from cbsa_lightning.files import replacing, writing


class MetricsFile:
    """``metrics.csv`` of a run, a row for each time that metrics were logged; at any time whole on the disk.

    Opened again, it drops the rows of later steps than the first one that is logged now: the part of the run that was
    cut off wrote them, and the resumed run writes them anew. A row that was there, of the same step and with a name in
    common, is replaced.

    Args:
        folder: Folder of the run.

    Raises:
        DataError: If there is a file that is no such table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "metrics.csv"
        self.hparams: dict[str, Any] = {}
        self.metrics = self._read()
        self._opened_again = bool(self.metrics)
        self._earlier = len(self.metrics)  # rows that were read from the file

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
        """Writes ``hparams.yaml``."""
        self.hparams.update(params)
        with replacing(self.folder / "hparams.yaml") as draft:
            save_hparams_to_yaml(str(draft), self.hparams)

    def save(self) -> None:
        """Writes the file."""
        if not self.metrics:
            return
        with replacing(self.file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, sorted(set().union(*self.metrics)))
            writer.writeheader()
            writer.writerows(self.metrics)


class RunLogger(CSVLogger):
    """Lightning's CSVLogger; but in a folder that has a ``metrics.csv`` already it goes on, instead of deleting it."""

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

    @classmethod
    def going_on(cls, folder: Path, logger: CSVLogger) -> RunLogger:
        """In the place of ``logger``, one that writes into ``folder``."""
        own = Path(logger.root_dir)
        if own.resolve() == folder.resolve().parent:  # the same words, so that ModelCheckpoint knows its folder again
            place = logger.save_dir, logger.name, folder.name
        else:
            place = str(folder.parent), "", folder.name
        return cls(*place, logger._prefix, logger._flush_logs_every_n_steps)
