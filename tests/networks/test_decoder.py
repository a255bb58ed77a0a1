"""Compares the label decoder with torch's layers, a slow recomputation, and CLIP's similarity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.metrics import mean_pairwise_cosine
from cbsa_lightning.networks.decoder import SHARPNESS, LabelDecoder
from reference.decoder import decode, weights_of


def inputs():
    """Returns queries, attention-path tokens and value-path tokens."""
    generator = torch.manual_seed(0)
    return (torch.randn(n, generator=generator) for n in ((5, 24), (3, 7, 24), (3, 7, 24)))


def build(**settings):
    return LabelDecoder(24, **{"layers": 2, "heads": 4, "feedforward": 40, **settings})


def shaken(decoder):
    """Adds noise to all weights because omissions are not detected if weights are 0 or 1."""
    with torch.no_grad():
        for i, p in enumerate(decoder.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.manual_seed(i)) * 0.1)
    return decoder.eval()


def stock(decoder, queries, local, places):
    """Computes the same decoder with torch's layers, repeating all inputs for every image."""

    def scaled(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    labels = scaled(queries - queries.mean(0)).expand(len(local), -1, -1)
    keys, values = scaled(places - places.mean(1, keepdim=True)), scaled(local + places)
    x = labels
    for block in decoder.blocks:
        if block.self_attention is not None:
            y = block.norm1(x)
            x = x + block.self_attention(y, y, y)[0]
        seen, weights = block.cross_attention(block.norm2(x) + labels, keys, values)
        x = x + seen
        x = x + block.linear2(block.linear1(block.norm3(x)).relu())
    return x, weights


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("self_attention", [True, False])
def test_values_and_gradients_equal_torchs_layers(maps, self_attention):
    decoder = shaken(build(dropout=0.0, self_attention=self_attention)).double().train()
    tensors = [x.double().requires_grad_(True) for x in inputs()]
    ours, weights = decoder(*tensors, maps)
    theirs, expected_weights = stock(decoder, *tensors)
    assert (weights is not None) == maps
    if maps:
        torch.testing.assert_close(weights, expected_weights, atol=1e-10, rtol=0)
    wanted = (*tensors, *decoder.parameters())
    assert len(wanted) == 3 + 2 * (18 if self_attention else 12)
    found = [torch.autograd.grad(output.square().sum(), wanted) for output in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("self_attention", [True, False])
def test_features_and_maps_equal_the_reference(self_attention):
    decoder = shaken(build(self_attention=self_attention))
    queries, local, places = inputs()
    with torch.no_grad():
        ours, maps = decoder(queries, local, places, True)
    assert ours.shape == (3, 5, 24)
    blocks = [weights_of(block) for block in decoder.blocks]
    for b in range(3):
        one = (x.double().numpy() for x in (queries, local[b], places[b]))
        expected, attention = decode(*one, blocks, 4)
        np.testing.assert_allclose(ours[b].numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(maps[b].numpy(), attention, atol=1e-6)
    np.testing.assert_allclose(maps.sum(-1).numpy(), 1, atol=1e-6)
    assert maps.std() > 1e-3


def test_untrained_decoder_attends_by_cosine_similarity():
    """With one head, attention is a softmax of cosines, and the feature is the text plus the attended values."""
    decoder = build(heads=1, dropout=0.0)
    queries, local, places = inputs()
    queries = queries - queries.mean(1, keepdim=True)  # the norm before attention would remove it
    with torch.no_grad():
        z, maps = decoder(queries, local, places, True)
    text = nn.functional.normalize(queries - queries.mean(0), dim=-1)
    centered = nn.functional.normalize(places - places.mean(1, keepdim=True), dim=-1)
    shares = (SHARPNESS * text @ centered.transpose(1, 2)).softmax(-1)
    found = shares @ nn.functional.normalize(local + places, dim=-1)
    # The second block attends with the class and the first result, and its output is still zero.
    torch.testing.assert_close(z, 24**0.5 * (text + found), atol=1e-3, rtol=0)
    assert float(mean_pairwise_cosine(maps).mean()) < 0.9


def test_a_single_class_attends_by_its_text_feature():
    decoder = build()
    queries, local, places = inputs()
    with torch.no_grad():
        _, maps = decoder(queries[:1], local, places, True)
    assert maps.isfinite().all()
    assert maps.std() > 1e-2


def test_a_constant_image_has_finite_features_and_gradients():
    decoder = build(dropout=0.0)
    queries, local, _ = inputs()
    places = torch.ones(3, 7, 24, requires_grad=True)
    z, maps = decoder(queries, local, places, True)
    z.square().sum().backward()
    torch.testing.assert_close(maps, torch.full_like(maps, 1 / 7))
    assert places.grad.isfinite().all()


def test_dropout_is_off_only_in_evaluation():
    decoder = build(layers=1, dropout=0.5)
    tensors = list(inputs())
    with torch.no_grad():
        assert not torch.equal(decoder(*tensors)[0], decoder(*tensors)[0])
        decoder.eval()
        assert torch.equal(decoder(*tensors)[0], decoder(*tensors)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="the feature width 24 is not divisible by 5 attention heads"):
        LabelDecoder(24, heads=5)


@pytest.mark.parametrize("self_attention", [True, False])
def test_dropout_differs_for_each_image(self_attention):
    decoder = shaken(build(layers=1, dropout=0.5, self_attention=self_attention)).train()
    queries, local, places = inputs()
    with torch.no_grad():
        alike, _ = decoder(queries, *(x[:1].expand(3, -1, -1) for x in (local, places)))
    assert (alike[0] - alike[1]).abs().max() > 0.1
    assert (alike[1] - alike[2]).abs().max() > 0.1
