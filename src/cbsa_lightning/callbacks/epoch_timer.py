"""Measures the training time per image."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class EpochTimer(L.Callback):
    """Logs ``time/ms_per_image`` after each epoch, with data loading but without validation and scoring passes."""

    def __init__(self) -> None:
        self._start = self._paused = 0.0
        self._images = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the timer of a resumed epoch."""
        self._restart()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the timer; this callback runs last, so the work of the other callbacks is not measured."""
        self._restart()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs after the last step of the epoch, since loggers are updated before the epoch ends."""
        self._images += len(batch.index) * trainer.world_size
        if trainer.is_last_batch:
            cost = 1000 * (time.perf_counter() - self._start) / self._images
            pl_module.log("time/ms_per_image", cost, on_step=False, on_epoch=True, batch_size=1)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stops the timer."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Resumes the timer after validation and after checkpoints have been written."""
        self._start += time.perf_counter() - self._paused

    def _restart(self) -> None:
        self._start, self._images = time.perf_counter(), 0
