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
"""Builds a scheduler, stepped once per optimizer step, from an optimizer and the number of steps of the stage."""


_LENGTHS = ("total_steps", "T_max")  # names of the number of steps in torch's schedulers


def scheduled(make: Callable[..., Any], optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Builds the schedule of a stage.

    Args:
        make: A :data:`SchedulerCallable`, or a function that builds a torch scheduler from the optimizer. ``T_max`` or
            ``total_steps``, if such a scheduler has it and it is not set, is the stage's length.
        optimizer: The optimizer.
        total_steps: Optimizer steps of the stage.

    Raises:
        ConfigError: If a scheduler lacks a setting, or needs a metric.
    """
    parts = (getattr(make, "func", None), *getattr(make, "args", ()))  # a configuration yields a partial of its class
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
            f"scheduler {name} cannot be created: {error}. Set the missing arguments below scheduler.init_args."
        ) from error
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler ReduceLROnPlateau follows a metric, but schedules here follow steps. Use another one."
        )
    return cast(LRScheduler, schedule)


class OneCycle:
    """One-cycle policy with each group's learning rate as its peak.

    Args:
        pct_start: Fraction of the cycle in which the rate increases (CAP: 0.2).
        cycle: Length of the cycle relative to the stage, at least 1. Above 1, the stage ends before the cycle does.
            In CAP's program, the second cycle is as long as both stages together: 1.25 for 8 + 32 epochs.
    """

    def __init__(self, pct_start: float = 0.2, cycle: float = 1.0) -> None:
        check_number("OneCycle: pct_start", pct_start, 0, 1)
        check_number("OneCycle: cycle", cycle, 1)
        self.pct_start = pct_start
        self.cycle = cycle

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Schedules ``total_steps`` optimizer steps."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        # Rise and fall have at least one step each, since torch divides by zero for a phase without steps.
        steps = max(round(self.cycle * total_steps), 3)
        return _OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=max(self.pct_start, 2 / steps))


class StepDecay(MultiStepLR):
    """Divides the learning rate at given places of the stage.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the stage.
        at: Shares of the stage after which the rate falls, each in [0, 1]; none keeps it constant.
        factor: What it is multiplied with each time, in [0, 1].

    Raises:
        ConfigError: A share or the factor is outside of its bounds.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, at: Sequence[float] = (0.5,), factor: float = 0.1
    ) -> None:
        for share in at:
            check_number("StepDecay: at", share, 0, 1)
        check_number("StepDecay: factor", factor, 0, 1)
        super().__init__(optimizer, [round(share * total_steps) for share in at], factor)


class _OneCycleLR(OneCycleLR):
    """Keeps its last rate after its end instead of raising an error, since Lightning's batch-size finder continues."""

    def get_lr(self) -> list[Any]:
        if self.last_epoch > self.total_steps:
            return [group["lr"] for group in self.optimizer.param_groups]
        return super().get_lr()
