"""Number of optimizer steps of a training stage, derived from the Trainer's limits."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from cbsa_lightning.errors import ConfigError


def stage_steps(trainer: Any, warmup_epochs: int, began_at: int) -> int:
    """Returns the number of optimizer steps of the current stage, for its learning-rate schedule.

    If ``max_epochs`` is given, it determines the length; ``max_steps`` and ``max_time`` can then only end training
    earlier, so that the run can be resumed with a larger limit. Otherwise, ``max_steps`` determines the length.

    Args:
        trainer: The Trainer during a fit.
        warmup_epochs: Number of epochs in the first stage.
        began_at: Number of optimizer steps before the stage.

    Raises:
        ConfigError: If neither ``max_epochs`` nor ``max_steps`` is given.
    """
    trainer.fit_loop.setup_data()  # determines the number of batches
    batches = trainer.num_training_batches if trainer.limit_train_batches != 0 else 0
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        if trainer.max_steps < 0:
            raise ConfigError(
                "The learning-rate schedule depends on the length of training. Set trainer.max_epochs or "
                "trainer.max_steps; trainer.max_time can only end training earlier."
            )
        left = int(trainer.max_steps) - began_at
        if trainer.current_epoch >= warmup_epochs:
            return max(left, 0)
        return min(left, _steps_of(trainer, batches, range(warmup_epochs)))
    if trainer.current_epoch < warmup_epochs:
        return _steps_of(trainer, batches, range(min(warmup_epochs, trainer.max_epochs)))
    return _steps_of(trainer, batches, range(warmup_epochs, trainer.max_epochs))


def ends_in_warmup(trainer: Any, warmup_epochs: int) -> bool:
    """Returns whether the limits of a Trainer end training before or at the end of the warm-up.

    Args:
        trainer: The Trainer at the start of training.
        warmup_epochs: Number of epochs in the first stage.
    """
    if 0 <= trainer.max_epochs <= warmup_epochs:
        return True
    if trainer.max_steps < 0 or trainer.current_epoch >= warmup_epochs:
        return False
    return int(trainer.max_steps) <= _steps_of(trainer, trainer.num_training_batches, range(warmup_epochs))


def _steps_of(trainer: Any, batches: float, epochs: range) -> int:
    if math.isinf(batches):
        raise ConfigError(
            "The training loader has no length, so the length of the learning-rate schedule is unknown. "
            "Set trainer.limit_train_batches to a number of batches."
        )
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    # Lightning sets up its own scheduler for Trainer(accumulate_grad_batches).
    of = schedulers[0].get_accumulate_grad_batches if schedulers else lambda _: trainer.accumulate_grad_batches
    return sum(-(-int(batches) // of(epoch)) for epoch in epochs)
