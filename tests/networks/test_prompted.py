"""What all prompted networks have in common: text of their prompts alone, and nothing else that moves in training."""

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
NETWORKS = {  # with the prompts of each of their texts, in order, and what else learns
    "DualCoOp": (DualCoOp, ["positive", "negative"], set()),
    "DualCoOp++": (DualCoOpPlusPlus, ["evidential", "positive", "negative"], {"log_temperature"}),
    "SCPNet": (partial(SCPNet, hidden=8), [], {"prompts.words", *(f"convolutions.{i}.weight" for i in range(3))}),
    "TaI": (TaI, ["global", "local"], {"log_scale"}),
    "TaI with a fixed scale": (partial(TaI, learn_scale=False), ["global", "local"], set()),
}


@pytest.fixture(params=NETWORKS)
def described(request):
    return NETWORKS[request.param]


@pytest.fixture(params=[True, False], ids=["shared", "own"])
def shared(request):
    return request.param


def build(make, folder, shared):
    torch.manual_seed(0)
    return make(NAMES, clip=str(folder), prompt_length=2, shared_prompts=shared).train()


def test_only_what_is_meant_to_learns_and_nothing_else_moves(clip_folder, described, shared):
    make, prompts, others = described
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


def test_text_is_that_of_the_prompts(clip_folder, described, shared):
    make, prompts, _ = described
    network = build(make, clip_folder, shared)
    words = [p for name, p in network.named_parameters() if name.endswith("prompts.words")]
    assert {tuple(p.shape) for p in words} == {(2, 16) if shared else (3, 2, 16)}
    if not prompts:
        return  # SCPNet's texts are refined: test_scpnet.py
    text = network.encode_text()
    for features, name in zip(text, prompts, strict=True):
        alone = encode_prompt_sets(network.clip, [getattr(network, f"{name}_prompts")])[0]
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
    assert (text[0] - text[1]).abs().max() > 1e-4
    image = network.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    torch.testing.assert_close(network(image).logits, network(image, text).logits)
