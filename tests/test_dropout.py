"""Dropout against its definition, and against torch in the cases that it leaves to torch."""

from __future__ import annotations

import pytest
import torch

from cbsa_lightning.dropout import Dropout, drop


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entries_are_dropped_independently_at_the_given_rate(dtype, rate):
    torch.manual_seed(0)
    x = torch.ones(400, 1001, dtype=dtype, requires_grad=True)
    y = drop(x, rate)
    dropped = (y == 0).float()
    n = dropped.numel()
    assert abs(float(dropped.mean()) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    # The squared number of dropped entries of a row or column has the expectation of a binomial distribution.
    for axis in (0, 1):
        counts, size = dropped.sum(axis), dropped.shape[axis]
        assert float(counts.var()) == pytest.approx(size * rate * (1 - rate), rel=0.3)
    for lag in (1, 2, 3, 4, 1001):  # four entries share one random number of 64 bits
        flat = dropped.flatten()
        joint = float((flat[:-lag] * flat[lag:]).mean())
        assert joint == pytest.approx(rate**2, abs=5 * rate / n**0.5)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - round(rate * 65536) / 65536)))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())


def test_the_seed_determines_the_mask():
    x = torch.ones(7, 13)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(drop(x, 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_layer_in_training_and_evaluation():
    x = torch.ones(100, 100)
    layer = Dropout(0.25)
    assert 0.2 < float((layer(x) == 0).float().mean()) < 0.3
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(100, 100))
    assert drop(torch.ones(0, 3), 0.5).shape == (0, 3)
