"""Compares SCPNet with loops: the graph of classes, its convolutions, the scores, and trained weights."""

from __future__ import annotations

import copy

import pytest
import torch

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.prompts import encode_prompt_sets
from cbsa_lightning.networks.scpnet import SCPNet
from reference.regions import assert_near, resnet_weights
from reference.scpnet import graph, logits, refine, relation
from tiny_clip import tiny_clip

NAMES = ["dog", "fire hydrant", "cat", "red bus", "person"]


def build(folder, **settings):
    torch.manual_seed(0)
    return SCPNet(NAMES, clip=str(folder), prompt_length=2, hidden=8, **settings)


def pictures(side=64):
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.mark.parametrize("neighbors", [None, 2, 3, 5])
def test_graph_of_classes(clip_folder, neighbors):
    network = build(clip_folder, neighbors=neighbors)
    found = network.graph
    texts = network.clip.encode_texts([f"a photo of a {name}." for name in NAMES]).double()
    related = relation(texts)
    assert_near(found, graph(related, neighbors or 5), 1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    torch.testing.assert_close(found.diagonal(), torch.full((5,), 0.8))
    assert ((found > 0).sum(1) == (neighbors or 5)).all()
    if neighbors is None:  # before the rows were normalized, the graph was symmetric
        unscaled = found.double() * (related.sum(1, keepdim=True) - 1) / 0.2
        unscaled.fill_diagonal_(1)
        torch.testing.assert_close(unscaled, related, atol=1e-5, rtol=0)
        torch.testing.assert_close(unscaled, unscaled.T, atol=1e-5, rtol=0)
    assert "graph" in dict(network.named_buffers())


@pytest.mark.parametrize("neighbors", [1, 0, -1, 6])
def test_neighbors_out_of_range_are_refused(clip_folder, neighbors):
    with pytest.raises(ConfigError, match=r"neighbors.* 2 "):
        build(clip_folder, neighbors=neighbors)


@pytest.mark.parametrize("neighbors", [None, 2])
def test_class_embeddings_and_gradients_equal_loops(clip_folder, neighbors):
    network = build(clip_folder, neighbors=neighbors)
    found = network.encode_text()
    text = encode_prompt_sets(network.clip, [network.prompts])[0]
    plain = text.detach().double().requires_grad_(True)
    ours = [layer.weight for layer in network.convolutions]
    assert [tuple(weight.shape) for weight in ours] == [(8, 24), (8, 8), (24, 8)]
    assert all(layer.bias is None for layer in network.convolutions)
    theirs = [weight.detach().double().requires_grad_(True) for weight in ours]
    expected = refine(plain, network.graph.double(), theirs)
    assert_near(found, expected)
    assert (found - text).abs().max() > 1e-2 * text.abs().max(), "the effect of the convolutions is too small to test"

    direction = torch.randn(5, 24, generator=torch.manual_seed(3))
    gradients = torch.autograd.grad((found * direction).sum(), [*ours, network.prompts.words])
    wanted = torch.autograd.grad((expected * direction).sum(), [*theirs, plain])
    for one, other in zip(gradients[:3], wanted[:3], strict=True):
        assert_near(one, other)
    # From text features to prompts, use the text tower's own gradient.
    (through,) = torch.autograd.grad(text, network.prompts.words, wanted[3].float())
    assert_near(gradients[3], through.double())


@pytest.mark.parametrize("settings", [{}, {"scale": 3.0}])
def test_scores_and_gradients_equal_loops(clip_folder, settings):
    network, generator = build(clip_folder, **settings), torch.manual_seed(2)
    values = (torch.randn(2, 256, 2, 2, generator=generator), torch.randn(5, 24, generator=generator))
    ours, theirs = ([v.to(t).requires_grad_(True) for v in values] for t in (torch.float32, torch.float64))
    output = network(*ours, attention=True)
    expected = logits(theirs[0], resnet_weights(network.clip.pool), theirs[1], settings.get("scale", 10.0))
    assert_near(output.logits, expected)
    assert output.attention is None
    assert output.context_logits is None
    direction = torch.randn(2, 5, generator=torch.manual_seed(3))
    found = torch.autograd.grad((output.logits * direction).sum(), ours)
    wanted = torch.autograd.grad((expected * direction).sum(), theirs)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("shared", [True, False])
def test_only_prompts_and_convolutions_are_trained(clip_folder, shared):
    network = build(clip_folder, shared_prompts=shared, graph_lr_scale=0.25).train()
    assert network.prompts.words.shape == ((2, 16) if shared else (5, 2, 16))
    before = copy.deepcopy(network.state_dict())
    groups = {group["lr_scale"]: group["params"] for group in network.parameter_groups()}
    assert {id(p) for p in groups[1.0]} == {id(network.prompts.words)}
    assert {id(p) for p in groups[0.25]} == {id(p) for p in network.convolutions.parameters()}
    optimizer = torch.optim.Adam([p for group in groups.values() for p in group], lr=0.01)
    network(network.features(pictures())).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"prompts.words", *(f"convolutions.{i}.weight" for i in range(3))}
    assert moved == {name for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["timm", "rot", "vit"])
def test_other_towers_and_half_precision(tmp_path, kind):
    network = build(tiny_clip(tmp_path, kind)).eval()
    features, text = network.features(pictures(network.clip.image_size)), network.encode_text()
    expected = 10 * torch.cosine_similarity(network.clip.pool(features).g[:, None], text, dim=-1)
    torch.testing.assert_close(network(features).logits, expected, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(features, text).logits.dtype == torch.float32
