"""Switches from the warm-up to the second stage, and restores the stage of a resumed run."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch

from cbsa_lightning.checkpoints.lean import TABLES


class Stages(L.Callback):
    """Starts the second stage after the warm-up, with a new loader, a new optimizer and schedule, and a weight average.

    As in CAP, the second stage starts from the weights at the end of the warm-up, and the optimizer, the schedule and
    the average are new. This callback also seeds each step, so that dropout depends only on (seed, epoch, step, rank).
    A resumed run therefore does not need the state of a random generator.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Clears the tables of an earlier fit; a resumed run loads its tables from the checkpoint."""
        resumed = trainer.ckpt_path is not None
        for name in TABLES:
            table = getattr(pl_module, name)
            setattr(pl_module, name, table.to(pl_module.device) if resumed and table is not None else None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets up the stage; this is the first hook that knows the epoch of a resumed run."""
        if trainer.current_epoch < pl_module.warmup_epochs:
            pl_module.ema.started.fill_(False)  # it is True if these weights come from an earlier run
        tuned = pl_module.lr is not None or pl_module.scheduled_steps != pl_module.stage_steps()
        if tuned and trainer.ckpt_path is None:
            # A learning-rate or batch-size finder has run since the first setup.
            trainer.strategy.setup_optimizers(trainer)
        pl_module.set_average_decay()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets up a new stage before thresholds are updated, since these depend on the averaged weights."""
        trainer.reload_dataloaders_every_n_epochs = 0
        if trainer.current_epoch != pl_module.warmup_epochs:
            return
        pl_module.stage_began_at = trainer.global_step
        if pl_module.warmup_epochs:
            trainer.strategy.setup_optimizers(trainer)
        pl_module.set_average_decay()
        pl_module.ema.start(pl_module.network)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seeds the step."""
        seed = getattr(getattr(trainer, "datamodule", None), "seed", 0)
        stream = np.random.SeedSequence(seed, spawn_key=(trainer.current_epoch, batch_idx, trainer.global_rank))
        torch.manual_seed(int(stream.generate_state(1)[0]))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clears the gradients of a skipped step, unless there is a gradient scaler, which needs them to skip it."""
        if pl_module.nonfinite.leaves_out and not pl_module.nonfinite.scaled:
            optimizer.zero_grad(set_to_none=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Makes Lightning reload the train loader before the first epoch of the second stage."""
        if trainer.current_epoch + 1 == pl_module.warmup_epochs:
            trainer.reload_dataloaders_every_n_epochs = 1
