"""The lower bound of benchmarks/floor.py computes the same functions as the network, and the report finds defects."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from floor import Floor
from step import Report, check_equality
from workload import Workload

WORKLOAD = Workload("VOC", "tiny", 3)


def started(network):
    """Gives every layer of the decoder weights away from zero, so that each of them affects the result."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_the_floor_has_the_outputs_and_gradients_of_the_network():
    floor = Floor(WORKLOAD, "cpu", "32-true")
    network = started(WORKLOAD.module(dropout=0.0).network)
    started(floor.network)
    features = network.features(WORKLOAD.images().images)
    text = network.encode_text()
    tokens, places = network.clip.pool.both(features)
    expected = text.target, tokens.g, network.decoder(text.semantic, tokens.l, places.l)[0]
    found = floor.outputs()
    torch.manual_seed(6)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.detach().abs().max()), rtol=0)
    weights = [torch.randn_like(part) for part in expected]
    for outputs in (found, expected):
        sum((w * part).sum() for w, part in zip(weights, outputs, strict=True)).backward()
    compared = 0
    for (name, mine), theirs in zip(floor.network.named_parameters(), network.parameters(), strict=True):
        # The gradient of the bias of the keys is zero, because it adds the same number to all logits of a softmax.
        if theirs.grad is not None and not name.endswith("k_proj.bias"):
            difference = float((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max())
            assert difference < 1e-4, f"{name}: {difference}"
            compared += 1
    assert compared > 40


def test_the_floor_in_half_precision_is_as_accurate_as_autocast():
    network = WORKLOAD.module(dropout=0.0).network
    exact = torch.cat(list(network.encode_text())).detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.cat(list(network.encode_text())).detach()
    bound = torch.cat(Floor(WORKLOAD, "cpu", "bf16-mixed").text()).detach()
    assert float((bound - exact).norm()) < 2 * float((ours - exact).norm())


def test_step_and_reference_and_floor_are_compared_before_the_measurement(monkeypatch):
    check_equality.cache_clear()
    check_equality("tiny")
    check_equality.cache_clear()
    monkeypatch.setattr(Floor, "outputs", lambda self, of=Floor.outputs: tuple(1.01 * x for x in of(self)))
    with pytest.raises(SystemExit, match=r"label features of the floor differs by 0\.01"):
        check_equality("tiny")
    check_equality.cache_clear()


def results(step, rounds=5):
    times = {"step 32-true": step, "floor 32-true": 2.0, "reference": 8.0}
    each = {"load": 0.1} | {name: {"wall": value, "cpu": value} for name, value in times.items()}
    return {"VOC:tiny:4": {"images": 4, "rounds": [each] * rounds, "memory": {"32-true": 0.4}}}


def test_a_step_that_is_faster_than_its_floor_is_a_defect():
    report = Report(results(step=1.5), "cpu")
    assert "| defect |" in report.text()
    assert "the wall time of a step is 0.75 times its floor" in report.defects[0]
    fine = Report(results(step=4.0), "cpu")
    assert "| 2.00 (2.00–2.00) | 2.00 (2.00–2.00) | 0.1000 | 5 |" in fine.text()
    assert not fine.defects


def test_ratios_of_fewer_than_five_rounds_are_not_reported():
    text = Report(results(step=4.0, rounds=4), "cpu").text()
    assert "| needs 5 rounds | needs 5 rounds |" in text
