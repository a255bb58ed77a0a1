"""From the warm-up to the second stage."""

from __future__ import annotations

from typing import Any

import lightning as L


class Stages(L.Callback):
    """Changes stage when the warm-up ends: new loader, new optimiser and schedule, average started.

    CAP's second stage likewise takes up the warm-up's weights with a fresh optimiser, schedule and average (fact B1).
    """

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Runs before thresholds are updated, since those are the average's."""
        if trainer.current_epoch != pl_module.warmup_epochs:
            return
        trainer.reload_dataloaders_every_n_epochs = 0
        if pl_module.warmup_epochs:
            trainer.strategy.setup_optimizers(trainer)
        pl_module.ema.start(pl_module.network)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Has Lightning ask for the second stage's loader before its first epoch."""
        if trainer.current_epoch + 1 == pl_module.warmup_epochs:
            trainer.reload_dataloaders_every_n_epochs = 1
