"""Compares DualCoOp++ with loops: evidence, the winner at each region, trained weights, and attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cbsa_lightning.method.losses import asymmetric_loss, binary_cross_entropy
from cbsa_lightning.networks.dualcoop_plus import DualCoOpPlusPlus
from cbsa_lightning.networks.prompts import encode_prompt_sets
from reference.dualcoop import asymmetric, cross_entropy
from reference.dualcoop_plus import two_logits
from reference.regions import assert_near, resnet_weights
from tiny_clip import tiny_clip

NAMES = ["dog", "fire hydrant", "cat"]


def build(folder, **settings):
    torch.manual_seed(0)
    return DualCoOpPlusPlus(NAMES, clip=str(folder), prompt_length=2, **settings)


def pictures(side=64):
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))


def both(network, normalized, grid=(2, 2), temperature=3.0, alike=0.9):
    """Returns outputs and leaves of network and reference, with positive texts ``alike`` enough to compete."""
    generator = torch.manual_seed(2)
    features = torch.randn(2, 256, *grid, generator=generator)
    texts = list(torch.randn(3, 3, 24, generator=generator))
    texts[1] = alike * texts[1].mean(0) + (1 - alike) * texts[1]
    ours, theirs = ([v.to(t).requires_grad_(True) for v in (features, *texts)] for t in (torch.float32, torch.float64))
    with torch.no_grad():
        network.log_temperature.fill_(temperature)
    output = network(ours[0], type(network.encode_text())(*ours[1:]), attention=True)
    theirs.append(torch.tensor(temperature, dtype=torch.float64, requires_grad=True))
    pairs, shares = two_logits(theirs[0], resnet_weights(network.clip.pool), *theirs[1:], normalized)
    return output, [*ours, network.log_temperature], pairs, shares, theirs


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("grid", "temperature"), [((2, 2), 3.0), ((2, 3), 2.0)])
def test_scores_maps_and_gradients_equal_loops(clip_folder, normalized, grid, temperature):
    network = build(clip_folder, normalized_winners=normalized)
    output, ours, pairs, shares, theirs = both(network, normalized, grid, temperature)
    assert_near(output.logits, pairs[..., 1] - pairs[..., 0])
    assert_near(torch.sigmoid(output.logits), torch.softmax(pairs, -1)[..., 1])
    assert output.attention.shape == (2, 3, *grid)
    assert_near(output.attention.flatten(2), shares)
    torch.testing.assert_close(output.attention.sum((2, 3)), torch.ones(2, 3))
    assert output.context_logits is None
    assert network(ours[0]).attention is None

    direction = torch.randn(2, 3, generator=torch.manual_seed(3))
    found = torch.autograd.grad((output.logits * direction).sum(), ours)
    expected = torch.autograd.grad(((pairs[..., 1] - pairs[..., 0]) * direction).sum(), theirs)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 1e-3)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("focal", [True, False])
def test_a_loss_on_two_logits_equals_the_loss_on_their_difference(clip_folder, normalized, focal):
    network = build(clip_folder, normalized_winners=normalized)
    output, ours, pairs, _, theirs = both(network, normalized)
    targets = torch.tensor([[1, 0, -1], [0, 1, 0]])
    logits = output.logits
    loss = (asymmetric_loss(logits, targets, 1, 2, 0.05) if focal else binary_cross_entropy(logits, targets)).sum()
    expected = asymmetric(pairs, targets, 1, 2, 0.05) if focal else cross_entropy(pairs, targets)
    assert_near(loss, expected)
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        assert_near(one, other, 1e-3)


def score_of_one_region(network, cosines):
    """Returns logits over e^3 if the only region has these cosines with positive texts, and 0 with negative ones."""
    features = torch.randn(1, 256, 1, 1, generator=torch.manual_seed(4))
    region = torch.nn.functional.normalize(network.clip.pool.values(features, positions=False).l[0, 0], dim=0)
    across = torch.randn(24, generator=torch.manual_seed(5))
    across = torch.nn.functional.normalize(across - (across @ region) * region, dim=0)
    positive = torch.stack([c * region + math.sqrt(1 - c * c) * across for c in cosines])
    text = type(network.encode_text())(evidential=torch.randn(3, 24), positive=positive, negative=across.expand(3, 24))
    return (network(features, text).logits[0] / math.exp(3)).tolist()


def test_the_winner_of_a_region_suppresses_other_classes(clip_folder):
    added, normalized = build(clip_folder), build(clip_folder, normalized_winners=True)
    assert score_of_one_region(added, [0.5, 1.0, 0.7]) == pytest.approx([0.5, 2.0, 0.7], abs=1e-4)
    assert score_of_one_region(normalized, [0.5, 1.0, 0.7]) == pytest.approx([0.0, 1.0, 0.0], abs=1e-4)
    assert score_of_one_region(added, [0.8, 0.8, 0.1]) == pytest.approx([1.2, 1.2, 0.1], abs=1e-3)
    assert score_of_one_region(normalized, [0.8, 0.8, 0.1]) == pytest.approx([0.8, 0.8, 0.0], abs=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_only_prompts_and_temperature_are_trained(clip_folder, shared):
    network = build(clip_folder, shared_prompts=shared).train()
    assert float(network.log_temperature.detach()) == 3.0
    names = ("evidential", "positive", "negative")
    text, before = network.encode_text(), copy.deepcopy(network.state_dict())
    for name in names:
        prompts = getattr(network, f"{name}_prompts")
        alone = encode_prompt_sets(network.clip, [prompts])[0]
        torch.testing.assert_close(getattr(text, name), alone, atol=1e-5, rtol=0)
        assert prompts.words.shape == ((2, 16) if shared else (3, 2, 16))
    learned = [p for group in network.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    network(network.features(pictures())).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"log_temperature", *(f"{name}_prompts.words" for name in names)}
    assert moved == {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(learned) == 4


@pytest.mark.parametrize("kind", ["timm", "rot", "vit"])
def test_other_towers_and_half_precision(tmp_path, kind):
    network = build(tiny_clip(tmp_path, kind)).eval()
    features = network.features(pictures(network.clip.image_size))
    text, output = network.encode_text(), network(features, attention=True)
    local = network.clip.pool.values(features, positions=False).l
    cosines = [torch.cosine_similarity(local[:, None], t[None, :, None], dim=-1) for t in text]
    share = (math.exp(3) * cosines[0]).softmax(-1)
    won = cosines[1] * (1 + (200 * cosines[1] * cosines[1].amax(1, keepdim=True)).softmax(1))
    torch.testing.assert_close(output.attention.flatten(2), share)
    torch.testing.assert_close(output.logits, math.exp(3) * (share * (won - cosines[2])).sum(-1), atol=1e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(features, text).logits.dtype == torch.float32
