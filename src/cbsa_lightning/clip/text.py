"""CLIP's text tower for prompt embeddings instead of token ids, so that prompts can be learned.

If the towers are frozen, the text tower takes most of the time of a small training step, so only the required outputs
are computed: tokens after the last end-of-text token are omitted, the last block computes only the end-of-text tokens,
and words that prompts share are encoded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from cbsa_lightning.attention import attention
from cbsa_lightning.errors import ConfigError


class TextTower(nn.Module):
    """A causal open_clip text tower whose output is the end-of-text token.

    A token depends only on the tokens before it, so tokens after the end-of-text token have no effect. Sequences may be
    truncated after the last end-of-text token of the batch. This gives the same features and gradients at a lower cost.

    Args:
        clip: A CLIP or CustomTextCLIP of open_clip. Its layers are shared, not copied.

    Raises:
        ConfigError: If the tower is not causal or its output is not the end-of-text token.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        source: Any = getattr(clip, "text", clip)
        # CLIP itself contains the parts of its text tower, and two of them have other names than in TextTransformer.
        pool_type = getattr(source, "text_pool_type", getattr(source, "pool_type", None))
        eos_id = getattr(source, "text_eos_id", getattr(source, "eos_id", None))
        causal = getattr(source, "attn_mask", None) is not None and getattr(source, "cls_emb", None) is None
        blocks = [type(block.attn) for block in source.transformer.resblocks] if causal else []
        if not causal or pool_type not in ("argmax", "eos"):
            raise ConfigError(
                f"text tower {type(source).__name__} is {'' if causal else 'not '}causal with pooling {pool_type!r}. "
                "Prompts can be learned only through a causal open_clip text transformer whose output is the "
                "end-of-text token (pool_type 'argmax' or 'eos', no class embedding)."
            )
        if unknown := [kind.__name__ for kind in blocks if kind is not nn.MultiheadAttention]:
            raise ConfigError(
                f"text tower {type(source).__name__} has blocks with the attention {unknown[0]}. Prompts can be "
                "learned only through open_clip's standard blocks (torch's MultiheadAttention)."
            )
        self.token_embedding: nn.Embedding = source.token_embedding
        self.positional_embedding: nn.Parameter = source.positional_embedding
        self.transformer: nn.Module = source.transformer
        self.ln_final: nn.Module = source.ln_final
        self.text_projection: nn.Parameter | nn.Linear | None = source.text_projection
        self.eos_id = eos_id if pool_type == "eos" else None

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt, including start and end."""
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
        """Returns the position (P,) of the end-of-text token in each row of ``tokens`` (P, L)."""
        return tokens.argmax(-1) if self.eos_id is None else (tokens == self.eos_id).int().argmax(-1)

    def forward(self, embeddings: Tensor, eot: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Encodes prompt embeddings to text features. The computation is differentiable.

        Args:
            embeddings: Prompt embeddings (P, L, w), without positions.
            eot: Position (P,) of the end-of-text token in each row of ``embeddings``.
            prefix: Common beginnings (G, N, w) of the prompts. The first P / G prompts begin with the first entry, the
                next P / G with the second, and so on. The beginnings are encoded G times instead of P times, which is
                exact because the tower is causal.

        Returns:
            Text features (P, d), not normalized.

        Raises:
            ConfigError: If N + L exceeds the context length.
        """
        before, length = 0 if prefix is None else prefix.shape[1], embeddings.shape[1]
        if before + length > self.context_length:
            raise ConfigError(f"prompts of {before + length} tokens exceed the limit of {self.context_length} tokens")
        positions = self.positional_embedding[: before + length].to(embeddings.dtype)
        x = embeddings + positions[before:]
        start = None if prefix is None else prefix + positions[:before]
        *blocks, last = self.transformer.resblocks  # type: ignore[misc]
        for block in blocks:
            x, start = _block(block, x, start)
        read: Tensor = self.ln_final(_last_block(last, x, start, eot))
        if self.text_projection is None:
            return read
        if isinstance(self.text_projection, nn.Linear):
            read = self.text_projection(read)
            return read
        return read @ self.text_projection


def _block(block: Any, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Applies a residual attention block of open_clip to prompts (P, L, w) and their common beginnings (G, N, w)."""
    q, k, v = _project(block.attn, block.ln_1(x), slice(None))
    if start is None:
        return _rest(block, x, attention(q, k, v, causal=True)), None
    q0, k0, v0 = _project(block.attn, block.ln_1(start), slice(None))
    k, v = _after(k0, k), _after(v0, v)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k0.shape[2])
    seen = attention(q, k, v, mask)
    return _rest(block, x, seen), _rest(block, start, attention(q0, k0, v0, causal=True))


def _last_block(block: Any, x: Tensor, start: Tensor | None, eot: Tensor) -> Tensor:
    """Applies a block and returns only the end-of-text tokens (P, w)."""
    width, normed = x.shape[2], block.ln_1(x)
    rows = torch.arange(len(x), device=x.device)
    k, v = _project(block.attn, normed, slice(width, None))
    if start is not None:
        k0, v0 = _project(block.attn, block.ln_1(start), slice(width, None))
        k, v = _after(k0, k), _after(v0, v)
    (q,) = _project(block.attn, normed[rows, eot][:, None], slice(width))
    before = k.shape[2] - x.shape[1]
    mask = torch.arange(k.shape[2], device=x.device) <= (before + eot)[:, None]
    seen = attention(q, k, v, mask[:, None, None])
    return _rest(block, x[rows, eot][:, None], seen)[:, 0]


def _project(attention: Any, x: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """Computes the queries, keys and values (B, heads, L, w / heads) for the given rows of the joint weight matrix."""
    projected = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    # The third dimension has one entry for each of the requested queries, keys and values.
    heads = projected.view(*x.shape[:2], -1, attention.num_heads, attention.head_dim)
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def _after(start: Tensor, own: Tensor) -> Tensor:
    """Concatenates keys or values of the common beginnings (G, heads, N, e) and of the prompts (P, heads, L, e)."""
    return torch.cat([start.repeat_interleave(len(own) // len(start), dim=0), own], dim=2)


def _rest(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Computes the part of a block after the attention: projection, feed-forward network and residual sums."""
    x = x + block.ls_1(block.attn.out_proj(seen.transpose(1, 2).flatten(2)))
    x = x + block.ls_2(_feed_forward(block.mlp, block.ln_2(x)))
    return x


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    if not isinstance(mlp.gelu, QuickGELU):
        out: Tensor = mlp(x)
        return out
    # QuickGELU, x sigmoid(1.702 x). SiLU stores only one tensor for the backward pass instead of two.
    out = mlp.c_proj(F.silu(1.702 * mlp.c_fc(x)) / 1.702)
    return out
