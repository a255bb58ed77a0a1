"""Runs a validation after the last epoch of a fit, regardless of the validation interval."""

from __future__ import annotations

from typing import Any

import lightning as L


class ValidateLastEpoch(L.Callback):
    """Adds a validation after the last epoch if ``trainer.check_val_every_n_epoch`` does not divide ``max_epochs``.

    Without this callback, a run could end without metrics of its final weights.
    """

    def __init__(self) -> None:
        self._interval: int | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets the interval to 1 in the last epoch. If it is None, Lightning validates after a number of steps."""
        if trainer.current_epoch + 1 == trainer.max_epochs and trainer.check_val_every_n_epoch is not None:
            self._interval, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restores the interval for further fits with the same Trainer."""
        if self._interval is not None:
            self._interval, trainer.check_val_every_n_epoch = None, self._interval
