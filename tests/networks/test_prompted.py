"""Properties that all prompted networks share: their text features and their trained parameters."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from cbsa_lightning.networks.dualcoop import DualCoOp
from cbsa_lightning.networks.dualcoop_plus import DualCoOpPlusPlus
from cbsa_lightning.networks.prompts import encode_prompt_sets
from cbsa_lightning.networks.scpnet import SCPNet
from cbsa_lightning.networks.tai import TaI

NAMES = ["dog", "fire hydrant", "cat"]
NETWORKS = {  # (class, prompts of its text features in order, other trained parameters)
    "DualCoOp": (DualCoOp, ["positive", "negative"], set()),
    "DualCoOp++": (DualCoOpPlusPlus, ["evidential", "positive", "negative"], {"log_temperature"}),
    "SCPNet": (partial(SCPNet, hidden=8), [], {"prompts.words", *(f"convolutions.{i}.weight" for i in range(3))}),
    "TaI": (TaI, ["global", "local"], {"log_scale"}),
    "TaI with a fixed scale": (partial(TaI, learn_scale=False), ["global", "local"], set()),
}


@pytest.fixture(params=NETWORKS)
def description(request):
    return NETWORKS[request.param]


@pytest.fixture(params=[True, False], ids=["shared", "own"])
def shared(request):
    return request.param


def build(make, folder, shared):
    torch.manual_seed(0)
    return make(NAMES, clip=str(folder), prompt_length=2, shared_prompts=shared).train()


def test_only_the_listed_parameters_are_trained(clip_folder, description, shared):
    make, prompts, others = description
    network = build(make, clip_folder, shared)
    before = copy.deepcopy(network.state_dict())
    learned = [p for group in network.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(1))
    network(network.features(images)).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{name}_prompts.words" for name in prompts} | others
    assert moved == {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(learned) == len(moved)


def test_text_features_of_the_prompts(clip_folder, description, shared):
    make, prompts, _ = description
    network = build(make, clip_folder, shared)
    words = [p for name, p in network.named_parameters() if name.endswith("prompts.words")]
    assert {tuple(p.shape) for p in words} == {(2, 16) if shared else (3, 2, 16)}
    if not prompts:
        return  # SCPNet refines its text features; see test_scpnet.py
    text = network.encode_text()
    for features, name in zip(text, prompts, strict=True):
        alone = encode_prompt_sets(network.clip, [getattr(network, f"{name}_prompts")])[0]
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
    assert (text[0] - text[1]).abs().max() > 1e-4
    image = network.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    torch.testing.assert_close(network(image).logits, network(image, text).logits)
