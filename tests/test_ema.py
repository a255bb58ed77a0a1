"""Compares the weight average with its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.method.ema import ParameterEMA
from tiny_data import tiny_module


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("name", ["2.weight", "1.weight", "1.running_mean", "1.running_var"])
def test_closed_form(name):
    net, decay, steps = model(), 0.9, 7
    ema = ParameterEMA(net, decay)
    net(torch.randn(5, 3))  # changes the statistics before the start of the average
    ema.start(net)
    history = [net.state_dict()[name].double()]
    for _ in range(steps):
        net(torch.randn(5, 3))  # changes the statistics
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        history.append(net.state_dict()[name].double())
        ema.update(net)
    assert not torch.equal(history[-1], history[-2])
    expected = decay**steps * history[0]
    for i in range(1, steps + 1):
        expected = expected + (1 - decay) * decay ** (steps - i) * history[i]
    with ema.applied_to(net):
        torch.testing.assert_close(net.state_dict()[name].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(net.state_dict()[name].double(), history[-1])


def test_applied_to_restores_the_weights():
    net = model()
    ema = ParameterEMA(net, 0.5)
    with ema.applied_to(net):
        assert torch.equal(net[0].weight, ema.get_buffer("average_of_0__weight"))  # the average has not started
    start = {k: v.clone() for k, v in net.state_dict().items()}
    ema.start(net)
    net(torch.randn(5, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    raw = {k: v.clone() for k, v in net.state_dict().items()}
    averaged = {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight", "2.bias"}
    assert not any(torch.equal(start[k], raw[k]) for k in averaged)

    def identities():
        return [id(x) for x in (*net.parameters(), *net.buffers())]

    before = identities()

    def inside():
        with ema.applied_to(net):
            now = net.state_dict()
            assert all(torch.equal(now[k], start[k] if k in averaged else raw[k]) for k in now)
            assert identities() == before
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        inside()
    assert all(torch.equal(v, raw[k]) for k, v in net.state_dict().items())
    assert torch.equal(ema.get_buffer("average_of_2__bias"), start["2.bias"])


def test_only_trained_parameters_are_averaged_and_restored():
    net = model()
    ema = ParameterEMA(net, 0.5)
    assert set(ema.state_dict()) == {
        "started",
        *(f"average_of_{n}" for n in ("0__weight", "1__weight", "1__bias", "2__weight", "2__bias")),
        *(f"average_of_1__running_{n}" for n in ("mean", "var")),
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


def test_frozen_norms_and_other_buffers_are_excluded():
    net = model()
    net[1].requires_grad_(False)
    net[2].register_buffer("table", torch.zeros(3))  # this buffer is not a running statistic
    ema = ParameterEMA(net, 0.5)
    assert set(ema.state_dict()) == {"started", "average_of_0__weight", "average_of_2__weight", "average_of_2__bias"}
    ema.start(net)
    net(torch.randn(5, 3))
    ema.update(net)
    raw = net[1].running_mean.clone()
    with ema.applied_to(net):
        assert torch.equal(net[1].running_mean, raw)


def test_counters_are_not_averaged():
    net = model()
    ema = ParameterEMA(net, 0.5)
    ema.start(net)
    for steps in range(1, 4):
        net(torch.randn(5, 3))
        ema.update(net)
        with ema.applied_to(net):
            assert net[1].num_batches_tracked == steps


def test_averaged_weights_are_used_with_averaged_statistics():
    """If training no longer changes the network, the average equals it, also in evaluation mode."""
    net, x = model(), torch.randn(5, 3)
    ema = ParameterEMA(net, 0.5)
    net(torch.randn(5, 3))
    ema.start(net)
    expected = net.eval()(x)
    net.train()(torch.randn(50, 3) * 10)
    assert not torch.equal(net.eval()(x), expected)
    with ema.applied_to(net):
        assert torch.equal(net(x), expected)


def test_keys_of_a_clip_network_are_its_trained_weights(clip_folder):
    """Earlier checkpoints still load because the average excludes BatchNorm statistics of frozen towers."""
    module = tiny_module(clip_folder)
    network = module.network
    assert any("running_mean" in name for name, _ in FrozenCLIP.load(str(clip_folder)).named_buffers())
    expected = {"average_of_" + name.replace(".", "__") for name, p in network.named_parameters() if p.requires_grad}
    assert set(module.ema.state_dict()) == {"started"} | expected
