"""CLIP's text tower on prompt embeddings instead of token ids, so that prompts can be learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cbsa_lightning.errors import ConfigError


class TextTower(nn.Module):
    """A causal open_clip text tower read out at the end-of-text token (method fact A2).

    Because a token sees only those before it, what follows the end-of-text token changes nothing: sequences
    may be cut behind the last one, at the same features and gradients and a fraction of the cost.

    Args:
        clip: open_clip's CLIP or CustomTextCLIP; the layers are shared, not copied.

    Raises:
        ConfigError: the tower is not causal, or is not read out at an end-of-text token.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        source: Any = getattr(clip, "text", clip)
        # CLIP holds the parts of its text tower itself, under other names than TextTransformer's for these two.
        pool_type = getattr(source, "text_pool_type", getattr(source, "pool_type", None))
        eos_id = getattr(source, "text_eos_id", getattr(source, "eos_id", None))
        causal = getattr(source, "attn_mask", None) is not None and getattr(source, "cls_emb", None) is None
        if not causal or pool_type not in ("argmax", "eos"):
            raise ConfigError(
                f"text tower {type(source).__name__} ({'' if causal else 'not '}causal, pooling {pool_type!r}): "
                "prompts can be learned only through a causal open_clip text transformer that is read out at the "
                "end-of-text token (pool_type 'argmax' or 'eos', no class embedding)."
            )
        self.token_embedding: nn.Embedding = source.token_embedding
        self.positional_embedding: nn.Parameter = source.positional_embedding
        self.transformer: nn.Module = source.transformer
        self.ln_final: nn.Module = source.ln_final
        self.text_projection: nn.Parameter | nn.Linear | None = source.text_projection
        self.attn_mask: Tensor
        self.register_buffer("attn_mask", source.attn_mask, persistent=False)
        self.eos_id = eos_id if pool_type == "eos" else None

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt may have, start and end included."""
        return self.positional_embedding.shape[0]

    @property
    def width(self) -> int:
        """Size of a token embedding."""
        return self.positional_embedding.shape[1]

    @property
    def embed_dim(self) -> int:
        """Size of a text feature."""
        if self.text_projection is None:
            return self.width
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection.out_features
        return self.text_projection.shape[1]

    def eot(self, tokens: Tensor) -> Tensor:
        """Position (P,) of the end-of-text token in ``tokens`` (P, L)."""
        return tokens.argmax(-1) if self.eos_id is None else (tokens == self.eos_id).int().argmax(-1)

    def forward(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Encodes prompt embeddings (P, L, w), end-of-text at ``eot`` (P,), to (P, d); differentiable.

        Raises:
            ConfigError: L exceeds the context length.
        """
        length = embeddings.shape[1]
        if length > self.context_length:
            raise ConfigError(f"prompts of {length} tokens; this text tower takes {self.context_length}")
        placed = embeddings + self.positional_embedding[:length].to(embeddings.dtype)
        x: Tensor = self.transformer(placed, attn_mask=self.attn_mask[:length, :length])
        x = self.ln_final(x)
        x = x[torch.arange(x.shape[0], device=x.device), eot]
        if self.text_projection is None:
            return x
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
            return x
        return x @ self.text_projection
