"""Transformer decoder that computes one image feature for each label from local image tokens (Eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.dropout import Dropout
from cbsa_lightning.networks.attention import attend, multi_head_attention

SHARPNESS = 20.0
"""Initial factor of the cosines of text and places in the attention logits, as for regions in DualCoOp."""


class LabelDecoder(nn.Module):
    """Decoder for label-specific image features. The text features of the classes attend to the image tokens (Eq. 4).

    The paper specifies only "a transformer decoder of two layers". With random initialization, the standard block
    learns to return the same feature for every label (``docs/explanation/choices.md``, "Label-specific features"). Four
    design choices prevent this, provided that CLIP's text and image features are aligned:

    - **The initial features are in CLIP's joint space.** Query, key and value projections are initialized with
      multiples of the identity, and all other branches with zero. An untrained decoder therefore attends to the places
      that CLIP finds most similar to the class, and returns their features.
    - **Keys and values are computed from different tokens.** Keys are value-path tokens, which describe only their own
      place. Values are the sum of both paths and thus include the content of the whole image.
    - **Attention depends only on differences.** Queries are centered over the classes and keys over the places, and all
      inputs are scaled to norm sqrt(d). Components that all classes or places have in common therefore cannot dominate
      the softmax.
    - **Blocks are pre-norm, and each block adds the class query to its input** before attention, as in DETR. Later
      blocks therefore still attend by class.

    Args:
        dim: d, the width of queries and tokens.
        layers: Number of blocks; the paper uses 2.
        heads: Number of attention heads. It must divide ``dim``.
        feedforward: Width of the hidden layer of each block.
        dropout: Dropout rate in the attention and feed-forward layers.
        self_attention: Whether the labels attend to each other, as in the standard block.

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
            queries: Semantic-aware text features t^s ``(C, d)``.
            local: Local image tokens l ``(B, HW, d)`` after the attention of CLIP's pool.
            places: Value-path tokens ``(B, HW, d)``, which describe only their own place.
            attention: Whether to return the cross-attention weights of the last block.

        Returns:
            Label-specific features z ``(B, C, d)`` and attention ``(B, C, HW)``, averaged over the heads, or None.
        """
        x, labels, keys, values = self.inputs(queries, local, places)
        weights = None
        for i, block in enumerate(self.blocks):
            x, weights = block(x, labels, keys, values, attention and i == len(self.blocks) - 1)
        return x, weights

    def inputs(self, queries: Tensor, local: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the input of the first block, the class queries that each block adds, the keys, and the values.

        The input and the class queries are equal, ``(1, C, d)``. Keys and values are ``(B, HW, d)``.
        """
        if len(queries) > 1:  # a single class would become zero
            queries = queries - queries.mean(0)
        labels = _scaled(queries)[None]
        keys = places - places.mean(1, keepdim=True)
        return labels, labels, _scaled(keys), _scaled(local + places)


class LabelDecoderBlock(nn.Module):
    """Pre-norm block of :class:`LabelDecoder`. Initially, the cross-attention of the first block returns its values."""

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
        self.dropout = Dropout(dropout)
        self._start(first)

    @torch.no_grad()
    def _start(self, first: bool) -> None:
        cross, identity = self.cross_attention, torch.eye(self.linear2.out_features)
        query, key, value = cross.in_proj_weight.chunk(3)
        # The query of the first block contains the class query twice, as input and as addend, hence the factor 1 / 2.
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
            # Dropout masks differ between images. Without dropout, shared queries do not need to be expanded.
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
