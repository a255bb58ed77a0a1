"""Access to private attributes and methods of Lightning, tested with lightning 2.6.6.

Lightning has no public interface for these functions. tests/test_resume.py, tests/ddp/ and tests/test_cli.py fail if a
new version of Lightning changes any of the attributes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.optim import Optimizer


def end_after_step(trainer: Any) -> None:
    """Stops the trainer after the current step, as its SIGTERM handler does, but in all processes at the same time."""
    trainer._signal_connector.received_sigterm = True


def replaces_samplers(trainer: Any) -> bool:
    """Returns the trainer's argument ``use_distributed_sampler``, which has no public attribute."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def has_begun(logger: Any) -> bool:
    """Returns whether a logger has already started its run. Accessing ``logger.experiment`` would start it."""
    return logger._experiment is not None


def log_into(logger: TensorBoardLogger, folder: Path) -> None:
    """Makes a logger write to an existing folder. Its constructor would append a version to the path."""
    logger._root_dir, logger._name, logger._version = str(folder.parent), "", folder.name


def logs_model(logger: WandbLogger) -> bool:
    """Whether a logger logs checkpoints as artifacts itself."""
    return bool(logger._log_model)


def csv_settings(logger: CSVLogger) -> tuple[str, int]:
    """Returns ``prefix`` and ``flush_logs_every_n_steps`` of a logger."""
    return logger._prefix, logger._flush_logs_every_n_steps


def saves_at_epoch_end(callback: ModelCheckpoint, trainer: Any) -> bool:
    """Returns whether a checkpoint callback may save at the end of an epoch. The default depends on the trainer."""
    return bool(callback._should_save_on_train_epoch_end(trainer))


def save_last(callback: ModelCheckpoint, trainer: Any) -> None:
    """Makes a checkpoint callback save its last checkpoint now, under the configured name."""
    found = callback._monitor_candidates(trainer)
    if callback.save_last:
        callback._save_last_checkpoint(trainer, found)
    else:
        trainer.save_checkpoint(callback.format_checkpoint_name(found))


def reload_data(trainer: Any) -> None:
    """Recreates the training loader.

    Lightning creates it before it restores the epoch and the position within the epoch from the checkpoint.
    """
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def validation_is_due(trainer: Any) -> bool:
    """Returns whether the loop validates after the current batch."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def is_logging(trainer: Any) -> bool:
    """Returns whether a loop that collects logged values is running."""
    return trainer._results is not None


def logged_values(trainer: Any) -> dict[str, Tensor]:
    """Returns the logged values of the epoch. Loggers receive them only after callbacks have saved checkpoints."""
    values: dict[str, Tensor] = trainer._logger_connector.metrics["log"]
    return values


def epoch_results(trainer: Any) -> Any:
    """Returns Lightning's collection of the values logged in the current epoch, as weighted sums instead of means."""
    return trainer.fit_loop.epoch_loop._results


def keep_epoch_results(trainer: Any) -> None:
    """Keeps the restored results of an epoch. By default, the first step after a restart resets them."""
    trainer._logger_connector._first_loop_iter = True


def restore_callback_metrics(trainer: Any, metrics: dict[str, Tensor]) -> None:
    """Updates ``trainer.callback_metrics``. Its public property returns a copy, which cannot be used for this."""
    trainer._logger_connector._callback_metrics.update(metrics)


def unfuse(optimizer: Optimizer) -> None:
    """Switches an optimizer to its unfused form, in place.

    Fused optimizers undo the gradient scaling of float16 within their step, so Lightning refuses to clip their
    gradients. It checks only the attribute below. It therefore also refuses bfloat16, although bfloat16 needs no
    scaling.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=True)
