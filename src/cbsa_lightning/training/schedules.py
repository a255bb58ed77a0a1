"""Learning-rate schedules over one stage of training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from cbsa_lightning.arguments import check_number
from cbsa_lightning.errors import ConfigError

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]
"""Builds a scheduler from an optimizer and the number of steps of the stage; it is updated in each optimizer step."""


_LENGTHS = ("total_steps", "T_max")  # names of the argument for the number of steps in torch's schedulers


def scheduled(make: Callable[..., Any], optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Builds the schedule of a stage.

    Args:
        make: A :data:`SchedulerCallable`, or a function that builds a torch scheduler from the optimizer. If such a
            scheduler has an argument ``T_max`` or ``total_steps`` that is not set, it is set to ``total_steps``.
        optimizer: The optimizer.
        total_steps: Number of optimizer steps of the stage.

    Raises:
        ConfigError: If an argument of the scheduler is missing, or if the scheduler depends on a metric.
    """
    parts = (getattr(make, "func", None), *getattr(make, "args", ()))  # a configuration yields a partial of the class
    kind = next((part for part in parts if isinstance(part, type)), make)
    name = getattr(kind, "__name__", type(kind).__name__)
    parameters = list(inspect.signature(kind).parameters.values())
    given: dict[str, Any] = getattr(make, "keywords", {})
    own = not (isinstance(kind, type) and issubclass(kind, LRScheduler))
    if own and sum(p.default is p.empty for p in parameters if p.name not in given) > 1:
        return cast(LRScheduler, make(optimizer, total_steps))
    length = {p.name: total_steps for p in parameters if p.name in _LENGTHS and given.get(p.name) is None}
    try:
        schedule = make(optimizer, **length)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler {name} cannot be created: {error}. Set the missing arguments in scheduler.init_args."
        ) from error
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler ReduceLROnPlateau depends on a metric, which is not supported. Use a scheduler that depends on "
            "the step only."
        )
    return cast(LRScheduler, schedule)


class OneCycle:
    """One-cycle policy with each group's learning rate as its peak.

    Args:
        pct_start: Fraction of the cycle in which the learning rate increases (0.2 in CAP).
        cycle: Length of the cycle relative to the stage, at least 1. If it is above 1, the stage ends before the cycle
            is complete. In the code of CAP, the second cycle is as long as both stages together, so this value is 1.25
            for 8 + 32 epochs.
    """

    def __init__(self, pct_start: float = 0.2, cycle: float = 1.0) -> None:
        check_number("OneCycle: pct_start", pct_start, 0, 1)
        check_number("OneCycle: cycle", cycle, 1)
        self.pct_start = pct_start
        self.cycle = cycle

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Builds the schedule for ``total_steps`` optimizer steps."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        # Both phases need at least one step, since torch divides by zero for a phase without steps.
        steps = max(round(self.cycle * total_steps), 3)
        return _OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=max(self.pct_start, 2 / steps))


class StepDecay(MultiStepLR):
    """Multiplies the learning rate by a factor at given points of the stage.

    Args:
        optimizer: The optimizer.
        total_steps: Number of optimizer steps of the stage.
        at: Fractions of the stage after which the learning rate is reduced, each in [0, 1]. If there are none, the
            learning rate is constant.
        factor: Factor by which the learning rate is multiplied each time, in [0, 1].

    Raises:
        ConfigError: If a fraction or the factor is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, at: Sequence[float] = (0.5,), factor: float = 0.1
    ) -> None:
        for share in at:
            check_number("StepDecay: at", share, 0, 1)
        check_number("StepDecay: factor", factor, 0, 1)
        super().__init__(optimizer, [round(share * total_steps) for share in at], factor)


class _OneCycleLR(OneCycleLR):
    """One-cycle schedule that keeps the last learning rate after its end.

    The schedule of torch raises an error instead, but Lightning's batch-size finder takes more steps.
    """

    def get_lr(self) -> list[Any]:
        if self.last_epoch > self.total_steps:
            return [group["lr"] for group in self.optimizer.param_groups]
        return super().get_lr()
