"""Transformer decoder that turns local image tokens into one image feature for each label (Eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.networks.attention import attend, multi_head_attention

SHARPNESS = 20.0
"""Attention logit per unit of cosine between text and place before training, as in DualCoOp for regions."""


class LabelDecoder(nn.Module):
    """Label-specific image features: the classes' text features attend to the local image tokens (Eq. 4).

    The paper specifies only "a transformer decoder of two layers". With random initialization, the standard block
    learns to return the same feature for every label (``docs/choices.md``, "Label-specific features"). Four design
    choices prevent this if CLIP's text and image features are aligned:

    - **It starts in CLIP's joint space.** Query, key and value projections start as multiples of the identity, and all
      other branches at zero. An untrained decoder therefore attends to the places that CLIP finds most similar to
      the class, and returns their features.
    - **Keys and values come from different tokens.** Keys are value-path tokens, which describe only their own place.
      Values are the sum of both paths and thus include the content of the whole image.
    - **Attention depends only on differences.** Queries are centered over the classes and keys over the places, and all
      inputs are scaled to norm sqrt(d). A component common to all classes or places cannot dominate the softmax.
    - **Blocks are pre-norm, and each adds the class query to its input** before attention, as DETR does. Later blocks
      thus still attend by class.

    Args:
        dim: d, width of queries and tokens.
        layers: Number of blocks; the paper uses 2.
        heads: Attention heads; must divide ``dim``.
        feedforward: Width of the hidden layer of each block.
        dropout: Rate in attention and feed-forward.
        self_attention: Whether the labels also attend to each other, as in the standard block.

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
        for name, value in (("layers", layers), ("heads", heads), ("feedforward", feedforward)):
            check_number(f"decoder_{name}", value, 1, whole=True)
        check_number("decoder_dropout", dropout, 0, 1)
        check_flags(decoder_self_attention=self_attention)
        super().__init__()
        self.blocks = nn.ModuleList(
            LabelDecoderBlock(dim, heads, feedforward, dropout, self_attention, first=i == 0) for i in range(layers)
        )

    def forward(
        self, queries: Tensor, local: Tensor, places: Tensor, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Decodes one feature per label.

        Args:
            queries: ``(C, d)``, semantic-aware text features t^s.
            local: ``(B, HW, d)``, local image tokens l, mixed by the attention of CLIP's pool.
            places: ``(B, HW, d)``, value-path tokens, each describing its own place.
            attention: Whether to return the cross-attention weights of the last block.

        Returns:
            Label-specific features z ``(B, C, d)`` and attention ``(B, C, HW)``, averaged over heads, or None.
        """
        x, labels, keys, values = self.inputs(queries, local, places)
        weights = None
        for i, block in enumerate(self.blocks):
            x, weights = block(x, labels, keys, values, attention and i == len(self.blocks) - 1)
        return x, weights

    def inputs(self, queries: Tensor, local: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the input of the first block, the class queries that each block adds, keys and values.

        The first two are ``(1, C, d)`` and equal; keys and values are ``(B, HW, d)``.
        """
        if len(queries) > 1:  # centering would make a single class zero
            queries = queries - queries.mean(0)
        labels = _scaled(queries)[None]
        keys = places - places.mean(1, keepdim=True)
        return labels, labels, _scaled(keys), _scaled(local + places)


class LabelDecoderBlock(nn.Module):
    """Pre-norm block of :class:`LabelDecoder`. If ``first``, cross-attention initially returns its values unchanged."""

    def __init__(
        self, dim: int, heads: int, feedforward: int, dropout: float, self_attention: bool, first: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim) if self_attention else None
        self.self_attention = multi_head_attention(dim, heads, dropout) if self_attention else None
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = multi_head_attention(dim, heads, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        self._start(first)

    @torch.no_grad()
    def _start(self, first: bool) -> None:
        cross, identity = self.cross_attention, torch.eye(self.linear2.out_features)
        query, key, value = cross.in_proj_weight.chunk(3)
        # The first block's query contains the class twice, as input and as addition, hence the factor 1 / 2.
        sharpness = SHARPNESS / 2 / cross.head_dim**0.5
        query.copy_(sharpness**0.5 * identity)
        key.copy_(sharpness**0.5 * identity)
        value.copy_(identity)
        cross.out_proj.weight.copy_(identity * first)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)
        if self.self_attention is not None:
            nn.init.zeros_(self.self_attention.out_proj.weight)

    def forward(
        self, x: Tensor, labels: Tensor, keys: Tensor, values: Tensor, attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the block on ``x (B or 1, C, d)``; ``labels (1, C, d)`` are added to the attention queries."""
        batch = keys.shape[0]
        if self.self_attention is not None and self.norm1 is not None:
            y = self.norm1(x)
            # Dropout differs for each image. Without dropout, shared queries need not be expanded.
            images = batch if self.training and self.dropout.p else x.shape[0]
            mixed, _ = attend(self.self_attention, y, y, y, images)
            x = x + self.dropout(mixed)
        seen, weights = attend(self.cross_attention, self.norm2(x) + labels, keys, values, batch, attention)
        x = x + self.dropout(seen)
        mixed = self.linear2(self.dropout(F.relu(self.linear1(self.norm3(x)))))
        return x + self.dropout(mixed), weights


def _scaled(x: Tensor) -> Tensor:
    """Scales vectors to norm sqrt(d), so that the mean square of their entries is 1."""
    return F.rms_norm(x, x.shape[-1:])
