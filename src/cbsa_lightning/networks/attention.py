"""Multi-head attention that projects shared inputs only once and can return its weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.attention import attention, attention_weights
from cbsa_lightning.dropout import drop
from cbsa_lightning.errors import ConfigError


def multi_head_attention(dim: int, heads: int, dropout: float) -> nn.MultiheadAttention:
    """Creates an attention layer for :func:`attend`.

    Raises:
        ConfigError: If ``heads`` does not divide ``dim``.
    """
    if dim % heads:
        raise ConfigError(f"the feature width {dim} is not divisible by {heads} attention heads; choose a divisor.")
    return nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)


def attend(
    layer: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor, batch: int, weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Applies ``layer``. Inputs that all images share are projected once and expanded afterwards.

    Args:
        layer: Layer that contains the projections and the dropout rate; see :func:`multi_head_attention`.
        queries: ``(B or 1, C, d)``.
        keys: ``(B or 1, L, d)``.
        values: ``(B or 1, L, d)``.
        batch: B.
        weights: Whether to return the attention weights, which the fused kernel does not expose.

    Returns:
        The output ``(B, C, d)`` and the attention weights ``(B, C, L)``, averaged over the heads, or None.
    """
    # One chunk is faster than three slices, because the backward pass of each slice allocates a full-size gradient.
    projections = tuple(zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True))

    def project(x: Tensor, part: int) -> Tensor:
        x = F.linear(x, *projections[part])
        x = x.view(*x.shape[:2], layer.num_heads, layer.head_dim).expand(batch, -1, -1, -1)
        return x.transpose(1, 2)  # (B, heads, L, d / heads)

    q, k, v = project(queries, 0), project(keys, 1), project(values, 2)
    rate = layer.dropout if layer.training else 0.0
    shares = None
    if weights:
        shares = attention_weights(q, k)
        mixed, shares = drop(shares, rate) @ v, shares.mean(1)
    else:
        mixed = attention(q, k, v, dropout=rate)
    return layer.out_proj(mixed.transpose(1, 2).flatten(2)), shares
