"""Compares TaI's two prompts with loops: global and local half, trained weights, and attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cbsa_lightning.networks.prompts import encode_prompt_sets
from cbsa_lightning.networks.tai import TaI
from reference.regions import assert_near, resnet_weights
from reference.tai import logits as slow_logits
from tiny_clip import tiny_clip

NAMES = ["dog", "fire hydrant", "cat"]


def build(folder, **settings):
    torch.manual_seed(0)
    return TaI(NAMES, clip=str(folder), prompt_length=2, **settings)


def pictures(side=64):
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.mark.parametrize("grid", [(2, 2), (2, 3)])
@pytest.mark.parametrize("scales", [{}, {"region_scale": 7.0, "scale": 4.0}])
def test_scores_maps_and_gradients_equal_loops(clip_folder, grid, scales):
    network, generator = build(clip_folder, **scales), torch.manual_seed(2)
    values = (torch.randn(2, 256, *grid, generator=generator), *torch.randn(2, 3, 24, generator=generator))
    ours, theirs = ([v.to(t).requires_grad_(True) for v in values] for t in (torch.float32, torch.float64))
    output = network(ours[0], type(network.encode_text())(*ours[1:]), attention=True)
    log_scale = torch.tensor(math.log(scales.get("scale", 20.0)), dtype=torch.float64, requires_grad=True)
    weights = resnet_weights(network.clip.pool)
    expected, shares = slow_logits(theirs[0], weights, *theirs[1:], scales.get("region_scale", 40.0), log_scale)
    assert_near(output.logits, expected)
    assert output.attention.shape == (2, 3, *grid)
    assert_near(output.attention.flatten(2), shares)
    torch.testing.assert_close(output.attention.sum((2, 3)), torch.ones(2, 3))
    assert output.context_logits is None
    assert network(ours[0]).attention is None

    direction = torch.randn(2, 3, generator=torch.manual_seed(3))
    found = torch.autograd.grad((output.logits * direction).sum(), [*ours, network.log_scale])
    wanted = torch.autograd.grad((expected * direction).sum(), [*theirs, log_scale])
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other)


def test_the_two_halves_have_equal_weight(clip_folder):
    """If texts equal image features, a cosine of 1 in one half yields half the scale, and in both the full scale."""
    network = build(clip_folder)
    features = torch.randn(1, 256, 1, 1, generator=torch.manual_seed(4))
    whole = network.clip.pool(features, positions=False).g[0]
    place = network.clip.pool.values(features, positions=False).l[0, 0]
    across = torch.randn(24, generator=torch.manual_seed(5))
    without_whole, without_place = (across - (across @ v) / (v @ v) * v for v in (whole, place))
    global_text = torch.stack([whole, whole, without_whole])
    local_text = torch.stack([place, without_place, place])
    text = type(network.encode_text())(global_text, local_text)
    assert network(features, text).logits[0].tolist() == pytest.approx([20, 10, 10], abs=1e-3)


@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_only_prompts_and_scale_are_trained(clip_folder, learn_scale, shared):
    network = build(clip_folder, learn_scale=learn_scale, shared_prompts=shared).train()
    text, before = network.encode_text(), copy.deepcopy(network.state_dict())
    for features, prompts in zip(text, (network.global_prompts, network.local_prompts), strict=True):
        torch.testing.assert_close(features, encode_prompt_sets(network.clip, [prompts])[0], atol=1e-5, rtol=0)
        assert prompts.words.shape == ((2, 16) if shared else (3, 2, 16))
    learned = [p for group in network.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    network(network.features(pictures())).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"global_prompts.words", "local_prompts.words"} | ({"log_scale"} if learn_scale else set())
    assert moved == {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(learned) == len(moved)


@pytest.mark.parametrize("kind", ["timm", "rot", "vit"])
def test_other_towers_and_half_precision(tmp_path, kind):
    network = build(tiny_clip(tmp_path, kind)).eval()
    features = network.features(pictures(network.clip.image_size))
    (global_text, local_text), output = network.encode_text(), network(features, attention=True)
    local = network.clip.pool.values(features, positions=False).l
    similar = torch.cosine_similarity(local[:, None], local_text[None, :, None], dim=-1)
    share = (40 * similar).softmax(-1)
    whole = torch.cosine_similarity(network.clip.pool(features, positions=False).g[:, None], global_text, dim=-1)
    torch.testing.assert_close(output.attention.flatten(2), share)
    torch.testing.assert_close(output.logits, 10 * (whole + (share * similar).sum(-1)), atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(features).logits.dtype == torch.float32
