"""Restores the state that Lightning does not restore, so that a resumed run equals an uninterrupted one.

Lightning restores weights, optimizer, schedule, callbacks and counters. This module also restores the position in the
epoch, the metrics that were logged so far in the epoch, accumulated gradients, and the metrics that callbacks monitor.
"""

from __future__ import annotations

import signal
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from cbsa_lightning import lightning_private
from cbsa_lightning.checkpoints.files import SOURCE, TORN
from cbsa_lightning.checkpoints.writing import WholeCheckpointIO
from cbsa_lightning.errors import CheckpointError, listed
from cbsa_lightning.networks.compiled import plain_name

_RUN = "cbsa_run"  # checkpoint key of this callback's state


class ExactResume(L.Callback):
    """Saves and restores the state that makes results bit-identical after resuming from any checkpoint.

    It also makes the Trainer write checkpoints atomically, and saves a checkpoint on SIGTERM. It relies on Lightning's
    private counters (``lightning_private.py``).
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replaces Lightning's default checkpoint IO unless the user has set one.

        In a ``fast_dev_run``, the checkpoint callbacks are removed, since Lightning 2.6 would write a checkpoint at its
        end.
        """
        if trainer.fast_dev_run:
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    # Saving ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the state that is needed to resume the run; this hook is called on all processes."""
        if trainer.state.fn != "fit":
            return
        loops = checkpoint["loops"]["fit_loop"]
        epoch, batches = loops["epoch_progress"]["total"], loops["epoch_loop.batch_progress"]["total"]
        if _cut_short(loops, trainer):  # by max_steps or max_time; Lightning counts such an epoch as completed
            for part in loops["epoch_progress"].values():
                part["processed"] -= 1
                part["completed"] = min(part["completed"], part["processed"])
        within_step, epoch_begins = batches["started"] > batches["processed"], epoch["started"] < epoch["ready"]
        if within_step or epoch_begins or pl_module.ema.exchanged:
            checkpoint[TORN] = True
            return
        kept: dict[str, Any] = {
            "callback_metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "figures": [],
            "unlogged": None,
            "gradients": {},
            "stage": [pl_module.stage, pl_module.stage_steps()],
            "stage_began_at": pl_module.stage_began_at,
            "lr": pl_module.lr,
            "optimizer": pl_module.optimizer_settings,
            "should_stop": trainer.should_stop and not _time_is_over(trainer),
            "begun": epoch["ready"] > 0,
            "data": _data_of(trainer),
        }
        if epoch["processed"] < epoch["ready"]:
            _settle(loops, trainer)
            kept["figures"] = _figures(trainer)
            kept["gradients"] = _gradients(trainer, pl_module)
        elif epoch["completed"] == epoch["processed"]:
            # The epoch is completed. Lightning would treat the next epoch as started but without batches.
            for part in loops["epoch_progress"].values():
                part["completed"] = max(0, part["completed"] - 1)
        elif lightning_private.is_logging(trainer):  # after training, nothing is left to log
            # Lightning logs the epoch's metrics only after callbacks have written their checkpoints.
            figures = {name: float(value) for name, value in lightning_private.logged_values(trainer).items()}
            kept["unlogged"] = {"epoch": trainer.current_epoch, **figures}
        if epoch["processed"] == epoch["ready"] and _epochs_are_over(trainer):
            for optimizer in checkpoint.get("optimizer_states", []):
                optimizer["state"] = {}  # no step will follow
        checkpoint[_RUN] = kept

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Saves a checkpoint on SIGTERM; all processes handle the signal between the same two steps."""
        callback = trainer.checkpoint_callback
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return
        if isinstance(callback, ModelCheckpoint) and not trainer.fast_dev_run:
            lightning_private.save_last(callback, trainer)

    # Restoring -------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Stores the state until training starts.

        Raises:
            CheckpointError: If the checkpoint was written with other data.
        """
        if trainer.state.fn != "fit":
            return
        file = checkpoint.get(SOURCE, trainer.ckpt_path)
        self._restored = checkpoint.get(_RUN, {})
        if not self._restored.get("begun", True):  # a tuner's temporary file, which has another batch size
            self._restored, trainer.ckpt_path = {}, None
            return
        now, then = _data_of(trainer), self._restored.get("data", {})
        if differing := sorted(name for name in now.keys() & then.keys() if now[name] != then[name]):
            raise CheckpointError(
                f"{file} was written with other data. These differ: {listed(differing)}. Resume with the data and the "
                "data settings of the original run (config.yaml and split.json in its folder)."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks the optimizer class before Lightning restores its state.

        Raises:
            CheckpointError: If the optimizer class differs.
        """
        now, then = pl_module.optimizer_settings.get("class"), self._restored.get("optimizer", {}).get("class")
        if then not in (None, now):
            raise CheckpointError(
                f"{trainer.ckpt_path} contains the state of the optimizer {then}, but this run uses {now}. Resume "
                "with the same optimizer."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restores the position in the epoch, metrics and gradients; this is the first hook that knows the position.

        Raises:
            CheckpointError: If the number of steps of the stage differs from that of its learning-rate schedule.
        """
        pl_module.asked_to_end = False
        if trainer.world_size > 1:
            # All processes must stop after the same step. Lightning's handler synchronizes the processes as soon as the
            # signal arrives, which can lead to a deadlock.
            signal.signal(signal.SIGTERM, lambda *_: setattr(pl_module, "asked_to_end", True))
        if trainer.ckpt_path is None:
            return
        lightning_private.reload_data(trainer)
        kept = self._restored
        if kept:  # checkpoints of earlier versions lack this state; they were written at the end of an epoch
            pl_module.stage_began_at, pl_module.lr = kept.get("stage_began_at", 0), kept.get("lr")
            done = trainer.fit_loop.epoch_progress.current.processed  # current_epoch may still be the previous epoch
            begins = done == pl_module.warmup_epochs and not trainer.fit_loop.restarted_mid_epoch
            stage, steps = kept["stage"]
            if not begins and _prolonged(stage, steps, trainer, pl_module):
                _take_new_settings(trainer, pl_module)
                rank_zero_info("max_steps is larger than before, so the learning rate now follows a longer schedule.")
            elif not begins:
                _check_length(stage, steps, trainer, pl_module)
                if kept.get("optimizer", pl_module.optimizer_settings) != pl_module.optimizer_settings:
                    _take_new_settings(trainer, pl_module)
                    rank_zero_info(
                        "The optimizer settings differ from those in the checkpoint. Training uses the new settings."
                    )
            trainer.should_stop = kept["should_stop"]
            _log_again(kept["figures"], trainer, pl_module)
            parameters = {plain_name(name): p for name, p in pl_module.named_parameters()}
            for name, gradient in kept["gradients"].items():
                parameters[name].grad = gradient.to(parameters[name])
        self._restore_figures(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restores metrics if the run had already finished, because training does not start in this case."""
        self._restore_figures(trainer)

    def _restore_figures(self, trainer: Any) -> None:
        """Restores callback metrics, and logs metrics that the loggers may have missed."""
        kept, self._restored = self._restored, {}
        metrics = {name: torch.tensor(value) for name, value in kept.get("callback_metrics", {}).items()}
        lightning_private.restore_callback_metrics(trainer, metrics)
        if kept.get("unlogged") is not None:
            for logger in trainer.loggers:
                logger.log_metrics(kept["unlogged"], step=trainer.global_step - 1)
                logger.save()


def _data_of(trainer: Any) -> dict[str, Any]:
    """Returns the data settings that affect the position in the epoch, the pseudo-labels or the context targets."""
    data = getattr(trainer, "datamodule", None)
    split = getattr(data, "split", None)
    if split is None:
        return {}
    sizes = ("batch_size", "labeled_per_batch", "warmup_batch_size", "seed")
    return {"table": split.table_digest, "split": split.digest, **{name: getattr(data, name) for name in sizes}}


def _cut_short(loops: dict[str, Any], trainer: Any) -> bool:
    """Returns whether an epoch ended before its last batch."""
    epoch, batches = loops["epoch_progress"]["total"], loops["epoch_loop.batch_progress"]
    ended = epoch["ready"] == epoch["processed"] > 0
    return bool(
        ended and not batches["is_last_batch"] and batches["current"]["processed"] < trainer.num_training_batches
    )


def _take_new_settings(trainer: Any, pl_module: Any) -> None:
    """Applies the current optimizer and schedule settings; keeps running averages and the schedule's position."""
    state = trainer.optimizers[0].state_dict()["state"]
    trainer.strategy.setup_optimizers(trainer)
    optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the schedule steps before the optimizer
        for _ in range(trainer.global_step - pl_module.stage_began_at):
            schedule.step()


def _epochs_are_over(trainer: Any) -> bool:
    """Returns whether ``max_epochs`` is reached."""
    limit = trainer.max_epochs
    return limit is not None and 0 <= limit <= trainer.fit_loop.epoch_progress.current.processed


def _time_is_over(trainer: Any) -> bool:
    """Returns whether ``max_time`` stops training; the run may be resumed with a larger limit."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


def _settle(loops: dict[str, Any], trainer: Any) -> None:
    """Changes the counters of an unfinished epoch to the state "between two batches".

    Lightning 2.6 resumes correctly only from this state. From other states, it skips validation that is due or the end
    of an epoch, or counts a step twice.
    """
    loop = trainer.fit_loop.epoch_loop
    batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    in_hook = batches["total"]["processed"] > batches["total"]["completed"]
    in_validation = validation["total"]["ready"] > validation["total"]["completed"]
    for part in ("total", "current"):
        done = batches[part]["processed"]
        batches[part].update(ready=done, started=done, completed=done)
    due = _validation_due(batches, trainer)
    if due and (in_hook or in_validation):
        for part in ("total", "current"):
            validation[part].update(ready=1, started=1, processed=0, completed=0)
    done = batches["current"]["processed"]
    last = batches["is_last_batch"] or done == trainer.num_training_batches
    accumulating = done % trainer.accumulate_grad_batches != 0 and not last
    counted_again = due and not accumulating  # whether the validation runs or is skipped
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = loop.global_step - int(counted_again)


def _validation_due(batches: dict[str, Any], trainer: Any) -> bool:
    """Returns whether the resumed loop will consider validation to be due after the last completed batch."""
    loop = trainer.fit_loop.epoch_loop
    before = loop.batch_progress.state_dict()
    loop.batch_progress.load_state_dict(batches)
    try:
        return lightning_private.validation_is_due(trainer)
    finally:
        loop.batch_progress.load_state_dict(before)


def _figures(trainer: Any) -> list[dict[str, Any]]:
    """Returns the value of each metric that all processes logged in this epoch, and the weights of mean values."""
    figures = []
    for metric in lightning_private.epoch_results(trainer).values():
        if not metric.is_tensor or metric.has_reset or not metric.meta.on_epoch:
            continue
        meta = metric.meta
        mean = getattr(metric, "cumulated_batch_size", None)
        figures.append(
            {
                **{key: getattr(meta, key) for key in ("fx", "name", "prog_bar", "logger", "on_step")},
                "reduce_fx": meta.reduce_fx.__name__,
                "sync_dist": meta.sync.should if trainer.world_size > 1 else None,  # Lightning drops it for one process
                "value": trainer.strategy.reduce(
                    metric.value.detach().clone(), reduce_op=meta.reduce_fx.__name__
                ).cpu(),
                "weight": None if mean is None else trainer.strategy.reduce(mean.double(), reduce_op="mean").cpu(),
            }
        )
    return figures


def _log_again(figures: list[dict[str, Any]], trainer: Any, pl_module: Any) -> None:
    results = lightning_private.epoch_results(trainer)
    if figures:
        lightning_private.keep_epoch_results(trainer)
    for figure in figures:
        settings = {key: figure[key] for key in ("prog_bar", "logger", "on_step", "reduce_fx")}
        sync = figure["fx"] == "training_step" if figure["sync_dist"] is None else figure["sync_dist"]
        settings["sync_dist"] = sync and trainer.world_size > 1
        value = figure["value"].to(pl_module.device)
        results.log(figure["fx"], figure["name"], value, batch_size=1, sync_dist_fn=trainer.strategy.reduce, **settings)
        metric = results[f"{figure['fx']}.{figure['name']}"]
        metric.value = torch.zeros_like(value) if figure["reduce_fx"] == "sum" and trainer.global_rank else value
        if figure["weight"] is not None:
            metric.cumulated_batch_size = figure["weight"].round().long().to(value.device)


def _gradients(trainer: Any, pl_module: Any) -> dict[str, Tensor]:
    """Returns the gradients accumulated since the last optimizer step; empty without gradient accumulation."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    if done % trainer.accumulate_grad_batches == 0 or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return {}
    return {
        plain_name(name): trainer.strategy.reduce(p.grad.detach().clone(), reduce_op="mean").cpu()
        for name, p in pl_module.named_parameters()
        if p.grad is not None
    }


def _prolonged(stage: str, steps: int, trainer: Any, pl_module: Any) -> bool:
    """Returns whether ``max_steps`` is larger than before and is the only limit on the length of training."""
    return bool(trainer.max_epochs == -1 and pl_module.stage == stage and pl_module.stage_steps() > steps)


def _check_length(stage: str, steps: int, trainer: Any, pl_module: Any) -> None:
    now = pl_module.stage_steps()
    if pl_module.stage == stage and now != steps:
        raise CheckpointError(
            f"{trainer.ckpt_path}: the {stage} stage of this run has a schedule of {steps} steps, but with the current "
            f"settings it has {now}. Resume with the max_epochs, warmup_epochs and batch sizes of the config.yaml "
            "in the run's folder. To train longer, start a new run."
        )
