"""Attention in all precisions against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from cbsa_lightning.attention import attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def by_formula(q, k, v, mask):
    q, k, v = (x.double() for x in (q, k, v))
    logits = torch.einsum("bhle,bhse->bhls", q, k) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~mask, -torch.inf).exp()
    return torch.einsum("bhls,bhse->bhle", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["all keys", "mask", "causal"])
def test_outputs_and_gradients_equal_the_formula(dtype, kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (5, 5, 5))
    mask = torch.ones(5, 5, dtype=torch.bool)
    options = {}
    if kind == "mask":
        mask = torch.rand(2, 1, 1, 5) < 0.6
        mask[..., 0] = True
        options = {"mask": mask}
    elif kind == "causal":
        mask, options = mask.tril(), {"causal": True}
    found, expected = attention(q, k, v, **options), by_formula(q, k, v, mask)
    seed = torch.randn(found.shape, dtype=torch.float64)
    pairs = zip(
        [found, *torch.autograd.grad(found, (q, k, v), seed.to(dtype))],
        [expected, *torch.autograd.grad(expected, (q, k, v), seed)],
        strict=True,
    )
    for ours, exact in pairs:
        assert float((ours.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_omits_weights(dtype):
    torch.manual_seed(0)
    q, k = (torch.zeros(1, 1, n, 4, dtype=dtype) for n in (2000, 10))  # every weight is 0.1
    found = attention(q, k, torch.eye(10, dtype=dtype)[None, None], dropout=0.25).float()
    assert float((found == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert found[found > 0] == pytest.approx(0.1 / 0.75, rel=0.01)
