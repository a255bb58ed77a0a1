"""Learning-rate schedules at their start, peak and end."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.training.schedules import OneCycle, StepDecay, scheduled


def rates(schedule, steps, peaks=(1e-3, 1e-4)):
    """Returns the learning rates of each optimizer step, with one column per parameter group."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in peaks]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": lr} for w, lr in zip(weights, peaks, strict=True)])
    scheduler = schedule(optimizer, steps)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return used


def test_one_cycle_has_its_peak_and_end_within_the_stage():
    used = rates(OneCycle(pct_start=0.2), 21)
    for group, peak in enumerate((1e-3, 1e-4)):
        column = [row[group] for row in used]
        assert column[0] == pytest.approx(peak / 25)
        assert column[-1] == pytest.approx(peak / 25 / 1e4)
        top = 0.2 * 21 - 1  # the step with the peak
        for i, rate in enumerate(column):
            low, high, share = (peak / 25, peak, i / top) if i <= top else (peak, peak / 25e4, (i - top) / (20 - top))
            assert rate == pytest.approx(low + (high - low) * (1 - math.cos(math.pi * share)) / 2), i


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.5])
def test_one_cycle_of_a_short_stage(steps, share):
    """If share * steps is 1, torch divides by zero; if it is less than 1, the schedule starts at the peak."""
    used = [row[0] for row in rates(OneCycle(share), steps)]
    assert used[0] == pytest.approx(1e-3 / 25)
    if steps > 1 and share * steps <= 2:
        assert used[1] == pytest.approx(1e-3)
    if steps > 2:
        assert used[-1] == pytest.approx(1e-3 / 25e4)


def test_the_unfinished_second_cycle_of_caps_code():
    """8 + 32 epochs: its second cycle spans 40 epochs, of which 32 are trained."""
    steps = 32 * 100
    used = [row[0] for row in rates(OneCycle(cycle=40 / 32), steps)]
    assert used.index(max(used)) == 8 * 100 - 1
    assert used[-1] == pytest.approx(1.46e-4, rel=0.01)
    assert sum(used) / steps == pytest.approx(6.2e-4, rel=0.01)


def optimizer_of(lr=1e-3):
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (OneCycle(), "total_steps"),
        (lambda optimizer, steps: OneCycleLR(optimizer, 1e-3, total_steps=steps), "total_steps"),
        (CosineAnnealingLR, "T_max"),
        (partial(CosineAnnealingLR, eta_min=1e-6), "T_max"),
        (partial(OneCycleLR, max_lr=1e-3), "total_steps"),
    ],
)
def test_a_schedule_has_the_length_of_the_stage(make, length):
    assert getattr(scheduled(make, optimizer_of(), 37), length) == 37


def test_settings_of_a_schedule_are_preserved():
    assert scheduled(partial(CosineAnnealingLR, T_max=5), optimizer_of(), 37).T_max == 5
    assert scheduled(partial(StepLR, step_size=4), optimizer_of(), 37).step_size == 4
    assert scheduled(lambda optimizer: StepLR(optimizer, 3), optimizer_of(), 37).step_size == 3


@pytest.mark.parametrize("make", [StepLR, partial(StepLR), OneCycleLR, ExponentialLR])
def test_schedules_with_missing_arguments_are_refused(make):
    with pytest.raises(ConfigError, match=r"step_size|max_lr|gamma"):
        scheduled(make, optimizer_of(), 37)


def test_schedules_that_depend_on_a_metric_are_refused():
    with pytest.raises(ConfigError, match="depends on a metric"):
        scheduled(ReduceLROnPlateau, optimizer_of(), 37)


@pytest.mark.parametrize(("at", "expected"), [([], [1e-3] * 4), ([0.5], [1e-3, 1e-3, 1e-4, 1e-4])])
def test_step_decay_at_fractions_of_the_stage(at, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = scheduled(partial(StepDecay, at=at), optimizer, 4)
    found = []
    for _ in range(4):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected)
    with pytest.raises(ConfigError, match="StepDecay: at must be a number"):
        StepDecay(optimizer, 4, [2.0])
