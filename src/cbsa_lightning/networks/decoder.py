"""Transformer decoder that turns local image tokens into one feature a label (Eq. 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.errors import ConfigError


class DecoderLayer(nn.Module):
    """The standard post-norm decoder block, which also hands out its cross-attention.

    Written out since ``nn.TransformerDecoderLayer`` keeps the attention weights to itself, and would repeat for each
    image what the first block does with queries that all images share; a test holds both equal.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float, self_attention: bool) -> None:
        super().__init__()
        self.self_attn = (
            nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True) if self_attention else None
        )
        self.norm1 = nn.LayerNorm(dim) if self_attention else None
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        """Runs the block on ``queries (B or 1, C, d)`` and ``tokens (B, HW, d)``; see :class:`LabelDecoder`."""
        x = queries
        if self.self_attn is not None and self.norm1 is not None:
            # Dropout is drawn for each image; without it, queries that are shared stay shared.
            batch = len(tokens) if self.training and self.dropout.p else len(x)
            mixed, _ = _attend(self.self_attn, x, x, batch)
            x = self.norm1(x + self.dropout(mixed))
        seen, weights = _attend(self.multihead_attn, x, tokens, len(tokens), attention)
        x = self.norm2(x + self.dropout(seen))
        mixed = self.linear2(self.dropout(nn.functional.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(mixed)), weights


def _attend(
    layer: nn.MultiheadAttention, queries: Tensor, tokens: Tensor, batch: int, attention: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What ``layer`` computes, with queries and tokens projected before they are repeated for ``batch`` images."""
    d = layer.embed_dim

    def project(x: Tensor, rows: slice) -> list[Tensor]:
        heads = F.linear(x, layer.in_proj_weight[rows], layer.in_proj_bias[rows])
        heads = heads.view(*x.shape[:2], -1, layer.num_heads, layer.head_dim).expand(batch, -1, -1, -1, -1)
        return [part.transpose(1, 2) for part in heads.unbind(2)]  # (batch, heads, L, d / heads)

    (q,), (k, v) = project(queries, slice(d)), project(tokens, slice(d, None))
    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if attention:  # the fused kernel keeps the weights to itself
        weights = (q / layer.head_dim**0.5 @ k.transpose(2, 3)).softmax(-1)
        seen, weights = F.dropout(weights, dropout) @ v, weights.mean(1)
    else:
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return layer.out_proj(seen.transpose(1, 2).flatten(2)), weights


class LabelDecoder(nn.Module):
    """Label-specific image features: the classes' text features look at the local image tokens (Eq. 4).

    Args:
        dim: d, width of queries and tokens.
        layers: Number of blocks; the paper uses 2.
        heads: Attention heads; must divide ``dim``.
        feedforward: Width of the hidden layer of each block.
        dropout: Rate in attention and feed-forward.
        self_attention: Whether queries also look at each other, as in the standard block.

    Raises:
        ConfigError: If ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        layers: int = 2,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"{heads} attention heads do not divide the feature width {dim}; choose a divisor.")
        self.layers = nn.ModuleList(
            DecoderLayer(dim, heads, feedforward, dropout, self_attention) for _ in range(layers)
        )

    def forward(self, queries: Tensor, tokens: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Decodes.

        Args:
            queries: ``(C, d)``, semantic-aware text features t^s.
            tokens: ``(B, HW, d)``, local image tokens l.
            attention: Whether to give the cross-attention of the last block.

        Returns:
            Label-specific features z ``(B, C, d)``, and attention ``(B, C, HW)``, a mean over heads, or None.
        """
        x, weights = queries[None], None
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, tokens, attention and i == len(self.layers) - 1)
        return x, weights
