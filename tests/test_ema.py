"""The average of weights against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cbsa_lightning.ema import ParameterEMA


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


def test_closed_form():
    net, decay, steps = model(), 0.9, 7
    ema = ParameterEMA(net, decay)
    ema.start(net)
    history = [net[2].weight.detach().double().clone()]
    for _ in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        history.append(net[2].weight.detach().double().clone())
        ema.update(net)
    expected = decay**steps * history[0]
    for i in range(1, steps + 1):
        expected = expected + (1 - decay) * decay ** (steps - i) * history[i]
    with ema.applied_to(net):
        torch.testing.assert_close(net[2].weight.detach().double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(net[2].weight.double(), history[-1])


def test_applied_lends_and_gives_back():
    net = model()
    ema = ParameterEMA(net, 0.5)
    with ema.applied_to(net):
        assert torch.equal(net[0].weight, ema.get_buffer("average_of_0__weight"))  # not started: its own weights
    start = {k: v.clone() for k, v in net.state_dict().items()}
    ema.start(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    raw = {k: v.clone() for k, v in net.state_dict().items()}
    identities = [id(p) for p in net.parameters()]

    def inside():
        with ema.applied_to(net):
            now = net.state_dict()
            trained = {n for n, p in net.named_parameters() if p.requires_grad}
            assert all(torch.equal(now[k], start[k] if k in trained else raw[k]) for k in now)
            assert [id(p) for p in net.parameters()] == identities
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        inside()
    assert all(torch.equal(v, raw[k]) for k, v in net.state_dict().items())
    assert torch.equal(ema.get_buffer("average_of_2__bias"), start["2.bias"])


def test_only_trainable_weights_and_a_round_trip():
    net = model()
    ema = ParameterEMA(net, 0.5)
    assert set(ema.state_dict()) == {
        "started",
        *(f"average_of_{n}" for n in ("0__weight", "1__weight", "1__bias", "2__weight", "2__bias")),
    }
    assert not bool(ema.started)
    ema.start(net)
    other = ParameterEMA(model(), 0.5)
    other.load_state_dict(ema.state_dict())
    assert bool(other.started)
    with torch.no_grad():
        net[2].bias.add_(2.0)
    ema.update(net)
    torch.testing.assert_close(ema.get_buffer("average_of_2__bias"), other.get_buffer("average_of_2__bias") + 1.0)
