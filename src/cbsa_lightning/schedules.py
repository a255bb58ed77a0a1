"""Learning-rate schedules over one stage of training."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]
"""Makes a scheduler from an optimiser and the number of steps of the stage; stepped once a step."""


class OneCycle:
    """The one-cycle policy, true to the stage's length, with each group's learning rate as its peak.

    Args:
        pct_start: Share of the stage in which the rate rises (CAP: 0.2).
    """

    def __init__(self, pct_start: float = 0.2) -> None:
        self.pct_start = pct_start

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Schedules ``total_steps`` optimiser steps."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        # Rise and fall take a step each at least: torch divides by zero where a phase has no length.
        steps = max(total_steps, 3)
        return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=max(self.pct_start, 2 / steps))


class Constant:
    """The learning rate stays as the optimiser has it."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Leaves every group as it is."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda _: 1.0)
