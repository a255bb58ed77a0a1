"""The cost model of runs on several GPUs, compared with values computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cluster_cost

GB = 1e9


def test_a_step_on_one_gpu_is_the_sum_of_the_measured_parts() -> None:
    assert cluster_cost.step_ms(64, 1) == pytest.approx(64 * (0.11 + 0.04 + 0.24 + 0.13 + 0.03 + 0.19))
    measured_at_8 = {name: part.ms(8) / 8 for name, part in cluster_cost.DIVIDED.items()}
    assert measured_at_8 == pytest.approx({"tower": 0.50, "pool": 0.26, "decoder": 0.98})


def test_only_the_image_parts_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_cost, "TRAINED", 0)
    steps = [cluster_cost.step_ms(64, gpus) for gpus in (1, 2, 8, 64)]
    assert steps == sorted(steps, reverse=True)
    repeated = 64 * (0.24 + 0.03 + 0.19)  # text, optimizer and average, rest
    assert all(step > repeated for step in steps)
    per_image = sum(part.per_image for part in cluster_cost.DIVIDED.values())
    assert steps[0] - steps[2] == pytest.approx(56 * per_image)
    # With 64 images on each GPU, a step takes the same time on any number of GPUs.
    assert cluster_cost.step_ms(64 * 8, 8) == pytest.approx(steps[0])


def test_the_network_limits_the_sum_of_the_gradients() -> None:
    assert cluster_cost.all_reduce_ms(GB, 1) == 0
    assert cluster_cost.all_reduce_ms(GB, 2) == pytest.approx(1000 / 200)  # each GPU sends and receives half, twice
    assert cluster_cost.all_reduce_ms(GB, 64) == pytest.approx(2 * 63 / 64 * 1000 / 25)


def test_each_gpu_has_an_image_in_each_stage() -> None:
    run = cluster_cost.plan(1280, 100, batch=64, gpus=64)
    assert (run.warmup.labeled, run.second.labeled + run.second.unlabeled) == (64, 64)
    assert cluster_cost.plan(1280, 100, batch=128, gpus=2).warmup.labeled == 32


def test_hours_by_hand() -> None:
    found = cluster_cost.hours(1280, 160, gpus=1)
    # 64 labeled images; 1,216 unlabeled ones, 60 per step.
    training = 8 * 4 * cluster_cost.step_ms(16, 1) + 32 * 21 * cluster_cost.step_ms(64, 1)
    assert found.steps == pytest.approx(training / 3.6e6)
    # Ten validations, zero-shot CLIP, predictions; 33 passes for thresholds, and the labels. Eight validations score
    # both sets of weights.
    scored = 12 * 160 + 34 * 1216
    passes = scored * 0.11 + (scored + 8 * 160) * (0.04 + 2.7 / 64)
    assert found.passes == pytest.approx(passes / 3.6e6)
    assert found.thresholds == pytest.approx(33 * 1216 * 80 * 11.8e-9 / 3600)
    assert found.filling == pytest.approx(1440 / 149 / 16 / 3600)
    assert found.total == pytest.approx(found.steps + found.passes + found.thresholds + found.filling)


def test_thresholds_and_the_image_cache_do_not_depend_on_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_cost, "NETWORK_GBS", float("inf"))
    one, many = (cluster_cost.hours(100_000, 1000, gpus) for gpus in (1, 64))
    assert many.passes == pytest.approx(one.passes / 64)
    assert (many.thresholds, many.filling) == pytest.approx((one.thresholds, one.filling))
