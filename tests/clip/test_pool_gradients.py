"""Compares gradients of the attention pools' weights and positions with autograd through the plain sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.clip.pooling import _Positioned
from tiny_clip import tiny_clip


@pytest.fixture(scope="module", params=["resnet", "timm", "rot"])
def pool(request, tmp_path_factory):
    folder = tiny_clip(tmp_path_factory.mktemp(request.param) / "clip", request.param)
    return FrozenCLIP.load(str(folder)).pool.double().requires_grad_(True)


def gradients(pool, features):
    pool.zero_grad()
    mixed, values = pool.both(features)
    (mixed.g.square().sum() + (mixed.l * values.l).sum()).backward()
    found = {name: p.grad.clone() for name, p in pool.named_parameters() if p.grad is not None}
    return torch.cat([mixed.l, values.l], 1).detach(), found


@pytest.mark.parametrize("grid", [(5, 5), (2, 2)])
def test_gradients_equal_those_of_the_plain_sum(pool, grid, monkeypatch):
    if grid == (2, 2) and type(pool).__name__ == "TimmPool" and hasattr(pool.attention, "feat_size"):
        pytest.skip("this pool supports only its native grid")
    features = torch.randn(3, 256, *grid, dtype=torch.float64, generator=torch.manual_seed(0))
    tokens, found = gradients(pool, features)
    monkeypatch.setattr(_Positioned, "through", lambda self, layer: layer(self.sum))
    plain_tokens, expected = gradients(pool, features)
    assert torch.equal(tokens, plain_tokens)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_features_get_a_gradient_if_required(pool, monkeypatch):
    def by_features():
        features = torch.randn(2, 256, 5, 5, dtype=torch.float64, generator=torch.manual_seed(1)).requires_grad_()
        pool(features).l.square().sum().backward()
        return features.grad

    found = by_features()
    monkeypatch.setattr(_Positioned, "through", lambda self, layer: layer(self.sum))
    torch.testing.assert_close(found, by_features())
    assert found.abs().sum() > 0


def test_backward_omits_the_product_for_the_tokens():
    layer, positions = nn.Linear(8, 24), torch.randn(5, 8, requires_grad=True)

    def products_of(images):
        tokens = torch.randn(images, 5, 8)
        out = _Positioned(tokens, positions).through(layer)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        return counter.get_total_flops()

    of_weights = 2 * 5 * 8 * 24  # floating-point operations of one image
    assert products_of(10) == 10 * of_weights + of_weights
