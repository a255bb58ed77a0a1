"""Saves the records of a run (its configuration and its split), and creates and locks its folder."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from cbsa_lightning.checkpoints.files import MODEL, RUN
from cbsa_lightning.data.labeled_images import LabeledImages
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.io import runs
from cbsa_lightning.io.runs import folder_of, refuse_taken


class RunRecord(SaveConfigCallback):
    """Saves the resolved configuration to the run's folder and to W&B, and saves the labeled split.

    This callback also creates the folder of a new run and locks the folder during training. A resumed run updates these
    files only when its first epoch starts, so the folder is unchanged if a checkpoint or a setting is rejected.
    """

    def __init__(self, *args: Any, resumed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed = resumed
        self._lock = ExitStack()
        self._folder = Path()  # set in setup()
        self._id = ""

    @cached_property
    def _plain(self) -> str:
        """The configuration as YAML; cached because jsonargparse needs a tenth of a second to write it."""
        text: str = self.parser.dump(self.config, skip_none=False)
        return text

    @cached_property
    def _model(self) -> str:
        """The model section of the configuration as YAML."""
        text: str = yaml.safe_dump(yaml.safe_load(self._plain)["model"], sort_keys=False)
        return text

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Locks the run's folder and saves the records; this hook is called on all processes."""
        if self.already_saved:
            return
        self._folder = cast(Path, folder_of(trainer))  # Lightning does not call this callback in a fast_dev_run
        if not self._resumed:
            self._claim(trainer, stage)
        self._id = trainer.strategy.broadcast(runs.run_id(self._folder) or runs.new_id())
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self._folder / runs.CHECKPOINTS).resolve())
        if not self._resumed:
            super().setup(trainer, pl_module, stage)

    def _claim(self, trainer: Any, stage: str) -> None:
        """Claims the folder. All processes raise an error together, since otherwise some would wait for the others."""
        problem = None
        if trainer.is_global_zero:
            try:
                refuse_taken(self._folder)
                if stage == "fit":
                    self._lock = runs.hold(self._folder)
            except ConfigError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise ConfigError(problem)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Saves the records; this is the first hook after all checks of a checkpoint."""
        super().setup(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves the records of a run that had already finished."""
        super().setup(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the run's ID and the model section of the configuration."""
        checkpoint[MODEL] = self._model
        checkpoint[RUN] = self._id

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Releases the lock."""
        self._lock.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Releases the lock."""
        self._lock.close()

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Saves the configuration on the first process."""
        if stage == "fit":
            runs.note(self._folder / runs.RUN_ID, f"{self._id}\n")
        plain = self._plain
        # Lightning's own method can leave a truncated file if the disk is full.
        runs.note(self._folder / runs.CONFIG, plain)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(plain), allow_val_change=True)
                runs.note(self._folder / runs.WANDB_ID, f"{logger.version}\n")
        split = getattr(trainer.datamodule, "split", None)
        if split is not None:
            split.save(self._folder / runs.SPLIT, trainer.datamodule.train_table)
            mask = getattr(trainer.datamodule, "label_mask", None)
            if mask is not None:
                mask.save(self._folder / runs.LABEL_MASK)
            LabeledImages.of(trainer.datamodule.train_table, split).write(self._folder / runs.LABELED)
