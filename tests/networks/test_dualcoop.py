"""Compares DualCoOp with loops: two logits as one, the loss on them, trained weights, and attention."""

from __future__ import annotations

import copy

import pytest
import torch

from cbsa_lightning.method.losses import asymmetric_loss, binary_cross_entropy
from cbsa_lightning.networks.dualcoop import DualCoOp
from cbsa_lightning.networks.prompts import encode_prompt_sets
from reference.dualcoop import asymmetric, cross_entropy, two_logits
from reference.regions import assert_near, resnet_weights
from tiny_clip import tiny_clip

NAMES = ["dog", "fire hydrant", "cat"]


def build(folder, **settings):
    torch.manual_seed(0)
    return DualCoOp(NAMES, clip=str(folder), prompt_length=2, **settings)


def pictures(side=64):
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))


def leaves(network, grid=(2, 2), apart=1.0, seed=2):
    """Returns random features and texts with gradients, in float32 and float64, with texts ``apart``."""
    generator = torch.manual_seed(seed)
    features = torch.randn(2, 256, *grid, generator=generator)
    positive, other = torch.randn(2, 3, 24, generator=generator)
    values = (features, positive, (1 - apart) * positive + apart * other)
    ours, theirs = ([v.to(t).requires_grad_(True) for v in values] for t in (torch.float32, torch.float64))
    return ours, type(network.encode_text())(*ours[1:]), theirs


@pytest.mark.parametrize("grid", [(2, 2), (2, 3)])
@pytest.mark.parametrize("scales", [{}, {"region_scale": 7.0, "scale": 30.0}])
def test_scores_maps_and_gradients_equal_loops(clip_folder, grid, scales):
    network = build(clip_folder, **scales)
    ours, text, theirs = leaves(network, grid)
    output = network(ours[0], text, attention=True)
    numbers = {"region_scale": 20.0, "scale": 100.0, **scales}
    pairs, shares = two_logits(theirs[0], resnet_weights(network.clip.pool), *theirs[1:], **numbers)
    assert_near(output.logits, pairs[..., 1] - pairs[..., 0])
    assert_near(torch.sigmoid(output.logits), torch.softmax(pairs, -1)[..., 1])
    assert output.attention.shape == (2, 3, *grid)
    assert_near(output.attention.flatten(2), shares)
    torch.testing.assert_close(output.attention.sum((2, 3)), torch.ones(2, 3))
    assert output.context_logits is None
    assert network(ours[0], text).attention is None

    direction = torch.randn(2, 3, generator=torch.manual_seed(3))
    found = torch.autograd.grad((output.logits * direction).sum(), ours)
    expected = torch.autograd.grad(((pairs[..., 1] - pairs[..., 0]) * direction).sum(), theirs)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("focal", [True, False])
def test_a_loss_on_two_logits_equals_the_loss_on_their_difference(clip_folder, focal):
    network = build(clip_folder)
    ours, text, theirs = leaves(network, apart=0.1)
    logits = network(ours[0], text).logits
    assert logits.detach().abs().min() < 3, "saturated everywhere: the loss would not be a useful test"
    pairs, _ = two_logits(theirs[0], resnet_weights(network.clip.pool), *theirs[1:], 20.0, 100.0)
    targets = torch.tensor([[1, 0, -1], [0, 1, 0]])
    loss = (asymmetric_loss(logits, targets, 1, 2, 0.05) if focal else binary_cross_entropy(logits, targets)).sum()
    expected = asymmetric(pairs, targets, 1, 2, 0.05) if focal else cross_entropy(pairs, targets)
    assert_near(loss, expected)
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        assert_near(one, other, 1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_text_features_of_the_two_prompts(clip_folder, shared):
    network = build(clip_folder, shared_prompts=shared)
    text = network.encode_text()
    for features, prompts in ((text.positive, network.positive_prompts), (text.negative, network.negative_prompts)):
        torch.testing.assert_close(features, encode_prompt_sets(network.clip, [prompts])[0], atol=1e-5, rtol=0)
        assert prompts.words.shape == ((2, 16) if shared else (3, 2, 16))
    assert (text.positive - text.negative).abs().max() > 1e-4
    features = network.features(pictures())
    torch.testing.assert_close(network(features).logits, network(features, text).logits)


def test_only_the_prompts_are_trained(clip_folder):
    network = build(clip_folder).train()
    before = copy.deepcopy(network.state_dict())
    learned = [p for group in network.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    network(network.features(pictures())).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    prompts = {"positive_prompts.words", "negative_prompts.words"}
    assert moved == prompts == {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(learned) == 2


@pytest.mark.parametrize("kind", ["timm", "rot", "vit"])
def test_other_towers_and_half_precision(tmp_path, kind):
    network = build(tiny_clip(tmp_path, kind)).eval()
    features = network.features(pictures(network.clip.image_size))
    output = network(features, attention=True)
    torch.testing.assert_close(output.attention.sum((2, 3)), torch.ones(2, 3))
    tokens = network.clip.pool.values(features)
    regions = torch.cat([tokens.g[:, None], tokens.l], 1)
    text = network.encode_text()
    yes, no = (torch.cosine_similarity(regions[:, None], t[None, :, None], dim=-1) for t in text)
    expected = 100 * ((20 * yes).softmax(-1) * (yes - no)).sum(-1)
    torch.testing.assert_close(output.logits, expected, atol=1e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(features, text).logits.dtype == torch.float32
