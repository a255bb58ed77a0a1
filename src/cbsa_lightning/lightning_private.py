"""The private parts of Lightning that this library uses, and why. Checked with lightning 2.6.6.

Lightning has no public interface for any of them. tests/test_resume.py, tests/ddp/ and tests/test_cli.py fail if a new
version changes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.optim import Optimizer


def end_after_step(trainer: Any) -> None:
    """Makes the trainer stop after the present step, as its SIGTERM handler does, but in all processes at once."""
    trainer._signal_connector.received_sigterm = True


def replaces_samplers(trainer: Any) -> bool:
    """Whether the trainer replaces samplers by distributed ones: it keeps ``use_distributed_sampler`` there only."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def has_begun(logger: Any) -> bool:
    """Whether a logger has its run already; ``logger.experiment`` would begin one."""
    return logger._experiment is not None


def log_into(logger: TensorBoardLogger, folder: Path) -> None:
    """Makes a logger continue in an existing folder; its constructor would add a version to the path."""
    logger._root_dir, logger._name, logger._version = str(folder.parent), "", folder.name


def logs_model(logger: WandbLogger) -> bool:
    """Whether a logger logs checkpoints as artifacts itself."""
    return bool(logger._log_model)


def csv_settings(logger: CSVLogger) -> tuple[str, int]:
    """Returns ``prefix`` and ``flush_logs_every_n_steps`` of a logger."""
    return logger._prefix, logger._flush_logs_every_n_steps


def saves_at_epoch_end(callback: ModelCheckpoint, trainer: Any) -> bool:
    """Whether a checkpoint callback may save at the end of an epoch, which by default depends on the trainer."""
    return bool(callback._should_save_on_train_epoch_end(trainer))


def save_last(callback: ModelCheckpoint, trainer: Any) -> None:
    """Makes a checkpoint callback save now, under the name and by the rules of its last checkpoint."""
    found = callback._monitor_candidates(trainer)
    if callback.save_last:
        callback._save_last_checkpoint(trainer, found)
    else:
        trainer.save_checkpoint(callback.format_checkpoint_name(found))


def reload_data(trainer: Any) -> None:
    """Makes the training loader again: Lightning makes it before it reads epoch and position from the checkpoint."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def validation_is_due(trainer: Any) -> bool:
    """Whether the loop validates after the batch that its counters name."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def is_logging(trainer: Any) -> bool:
    """Whether a loop is running that collects logged values; None of them is after its end."""
    return trainer._results is not None


def logged_values(trainer: Any) -> dict[str, Tensor]:
    """The epoch's values, which Lightning passes to the loggers only after callbacks have saved their checkpoints."""
    values: dict[str, Tensor] = trainer._logger_connector.metrics["log"]
    return values


def epoch_results(trainer: Any) -> Any:
    """Lightning's collection of the values that were logged in the present epoch: weighted sums, not yet means."""
    return trainer.fit_loop.epoch_loop._results


def keep_epoch_results(trainer: Any) -> None:
    """Makes the first step after a restart keep the restored results; it would reset them."""
    trainer._logger_connector._first_loop_iter = True


def restore_callback_metrics(trainer: Any, metrics: dict[str, Tensor]) -> None:
    """Adds to ``trainer.callback_metrics``, whose public form is a copy."""
    trainer._logger_connector._callback_metrics.update(metrics)


def unfuse(optimizer: Optimizer) -> None:
    """Switches an optimizer to its unfused form, in place.

    Fused optimizers undo float16's gradient scaling within their step, so Lightning refuses to clip their gradients.
    It decides by the attribute below, also for bfloat16, which needs no scaling.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=True)
