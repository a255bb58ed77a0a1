"""The label decoder against torch's own decoder and a plain re-computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.decoder import LabelDecoder
from reference.decoder import decode, layers_of


def inputs():
    generator = torch.manual_seed(0)
    return torch.randn(5, 24, generator=generator), torch.randn(3, 7, 24, generator=generator)


def shaken(decoder):
    """Norms and biases start at 0 and 1, where a swap or an omission would not show."""
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=torch.manual_seed(p.numel())) * 0.1)
    return decoder.eval()


@pytest.mark.parametrize("maps", [False, True])
def test_equals_torchs_decoder(maps):
    decoder = shaken(LabelDecoder(24, layers=2, heads=4, feedforward=40))
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 40, batch_first=True), 2).eval()
    theirs.load_state_dict(decoder.state_dict())
    queries, tokens = inputs()
    with torch.no_grad():
        ours, weights = decoder(queries, tokens, maps)
        expected = theirs(queries.expand(3, -1, -1), tokens)
    assert (weights is not None) == maps
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("self_attention", [True, False])
def test_features_and_maps_by_hand(self_attention):
    decoder = shaken(LabelDecoder(24, layers=2, heads=4, feedforward=40, self_attention=self_attention))
    queries, tokens = inputs()
    with torch.no_grad():
        ours, maps = decoder(queries, tokens, True)
    assert ours.shape == (3, 5, 24)
    for b in range(3):
        expected, attention = decode(queries.double().numpy(), tokens[b].double().numpy(), layers_of(decoder), 4)
        np.testing.assert_allclose(ours[b].numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(maps[b].numpy(), attention, atol=1e-6)
    np.testing.assert_allclose(maps.sum(-1).numpy(), 1, atol=1e-6)
    assert maps.std() > 1e-3


def test_without_self_attention_a_class_does_not_depend_on_the_others():
    decoder = shaken(LabelDecoder(24, layers=2, heads=4, feedforward=40, self_attention=False))
    queries, tokens = inputs()
    with torch.no_grad():
        torch.testing.assert_close(decoder(queries[:1], tokens)[0], decoder(queries, tokens)[0][:, :1])
    assert not any("self_attn" in name for name in decoder.state_dict())


def test_dropout_is_off_in_evaluation_only():
    decoder = LabelDecoder(24, layers=1, heads=4, feedforward=40, dropout=0.5)
    queries, tokens = inputs()
    with torch.no_grad():
        assert not torch.equal(decoder(queries, tokens)[0], decoder(queries, tokens)[0])
        decoder.eval()
        assert torch.equal(decoder(queries, tokens)[0], decoder(queries, tokens)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="5 attention heads do not divide the feature width 24"):
        LabelDecoder(24, heads=5)


def test_training_equals_torchs_decoder_in_value_and_gradient():
    decoder = shaken(LabelDecoder(24, layers=2, heads=4, feedforward=40, dropout=0.0)).double().train()
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 40, 0.0, batch_first=True), 2).double()
    theirs.load_state_dict(decoder.state_dict())
    queries, tokens = (x.double().requires_grad_(True) for x in inputs())
    found = []
    for model, output in ((decoder, decoder(queries, tokens)[0]), (theirs, theirs(queries.expand(3, -1, -1), tokens))):
        wanted = (queries, tokens, *dict(sorted(model.named_parameters())).values())
        found.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    assert len(found[0]) == 3 + 2 * 18
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("self_attention", [True, False])
def test_dropout_is_drawn_for_each_image(self_attention):
    decoder = LabelDecoder(24, layers=1, heads=4, feedforward=40, dropout=0.5, self_attention=self_attention)
    queries, tokens = inputs()
    with torch.no_grad():
        alike, _ = decoder(queries, tokens[:1].expand(3, -1, -1))
    assert (alike[0] - alike[1]).abs().max() > 0.1
    assert (alike[1] - alike[2]).abs().max() > 0.1
