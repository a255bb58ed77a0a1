"""Transformer decoder that turns local image tokens into one feature a label (Eq. 4)."""

from __future__ import annotations

from torch import Tensor, nn

from cbsa_lightning.errors import ConfigError


class DecoderLayer(nn.Module):
    """The standard post-norm decoder block, which also hands out its cross-attention.

    Written out since ``nn.TransformerDecoderLayer`` keeps the attention weights to itself; a test holds both equal.
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
        """Runs the block on ``queries (B, C, d)`` and ``tokens (B, HW, d)``; see :class:`LabelDecoder`."""
        x = queries
        if self.self_attn is not None and self.norm1 is not None:
            mixed, _ = self.self_attn(x, x, x, need_weights=False)
            x = self.norm1(x + self.dropout(mixed))
        seen, weights = self.multihead_attn(x, tokens, tokens, need_weights=attention)
        x = self.norm2(x + self.dropout(seen))
        mixed = self.linear2(self.dropout(nn.functional.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(mixed)), weights


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
        x = queries.expand(len(tokens), -1, -1)
        weights = None
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, tokens, attention and i == len(self.layers) - 1)
        return x, weights
