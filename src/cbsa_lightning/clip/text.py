"""CLIP's text tower for prompt embeddings instead of token ids, so that prompts can be learned.

If the towers are frozen, the text tower takes most of the time of a small training step, so only the required outputs
are computed: tokens after the end-of-text tokens are omitted, the last block computes only the end-of-text tokens, and
words that prompts share are encoded once.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
        packing = _Packing.of(eot, length)
        x = packing.pack(embeddings + positions[before:])
        start = None if prefix is None else prefix + positions[:before]
        *blocks, last = self.transformer.resblocks  # type: ignore[misc]
        for block in blocks:
            x, start = _block(block, packing, x, start)
        read: Tensor = self.ln_final(_last_block(last, packing, x, start))
        if self.text_projection is None:
            return read
        if isinstance(self.text_projection, nn.Linear):
            read = self.text_projection(read)
            return read
        return read @ self.text_projection


class _Packing(NamedTuple):
    """Arrangement of P prompts in a tensor (N, w) of all their tokens, in groups of the same number of tokens.

    On a CPU, each group contains the prompts of one length, so that there is no padding. On other devices, all prompts
    form one padded group, because more groups would require more kernel launches.

    Attributes:
        order: Prompts (P,) in the order of the groups. A single group keeps the original order.
        ends: Position (P,) of the end-of-text token of each prompt, in the same order.
        groups: Number of prompts, and number of tokens of each of them, for each group.
    """

    order: Tensor
    ends: Tensor
    groups: list[tuple[int, int]]

    @classmethod
    def of(cls, eot: Tensor, length: int) -> _Packing:
        """Arranges prompts of at most ``length`` tokens with the given positions (P,) of their end-of-text tokens."""
        if eot.device.type != "cpu":
            return cls(torch.arange(len(eot), device=eot.device), eot, [(len(eot), length)])
        ends, order = eot.sort(stable=True)
        return cls(order, ends, [(len(list(equal)), end + 1) for end, equal in groupby(ends.tolist())])

    def pack(self, x: Tensor) -> Tensor:
        """Converts prompts (P, L, w) to tokens (N, w)."""
        if len(self.groups) > 1:
            x = x.index_select(0, self.order)
        pieces = zip(self.by_prompt(x), self.groups, strict=True)
        return torch.cat([piece[:, :length].flatten(0, 1) for piece, (_, length) in pieces])

    def unsorted(self, x: Tensor) -> Tensor:
        """Restores the original order of the prompts in a tensor (P, w)."""
        return x.index_select(0, self.order.argsort()) if len(self.groups) > 1 else x

    def by_token(self, x: Tensor) -> list[Tensor]:
        """Splits a tensor (N, ...) with one row per token into a tensor (number, length, ...) for each group."""
        pieces = torch.split(x, [number * length for number, length in self.groups])
        return [piece.view(*group, *x.shape[1:]) for piece, group in zip(pieces, self.groups, strict=True)]

    def by_prompt(self, x: Tensor) -> list[Tensor]:
        """Splits a tensor (P, ...) with one row per prompt, in the order of the groups, into one for each group."""
        return list(torch.split(x, [number for number, _ in self.groups]))

    def end_tokens(self, x: Tensor) -> Tensor:
        """Selects the end-of-text tokens (P, w) from tokens (N, w)."""
        found = zip(self.by_token(x), self.by_prompt(self.ends), strict=True)
        return torch.cat([piece[torch.arange(len(piece), device=x.device), ends] for piece, ends in found])


def _block(block: Any, packing: _Packing, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Applies a residual attention block of open_clip to tokens (N, w) and to common beginnings (G, S, w)."""
    layer = block.attn
    heads = [_heads(layer, piece) for piece in packing.by_token(_project(layer, block.ln_1(x), slice(None)))]
    if start is None:
        seen = [attention(q, k, v, causal=True) for q, k, v in heads]
        return _rest(block, x, _tokens(seen)), None
    q0, k0, v0 = _heads(layer, _project(layer, block.ln_1(start), slice(None)))
    seen = []
    for (q, *_), (k, v) in zip(heads, _after([k0, v0], [rest for _, *rest in heads], packing), strict=True):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(start.shape[1])
        seen.append(attention(q, k, v, mask))
    own = _tokens([attention(q0, k0, v0, causal=True)]).view_as(start)
    return _rest(block, x, _tokens(seen)), _rest(block, start, own)


def _last_block(block: Any, packing: _Packing, x: Tensor, start: Tensor | None) -> Tensor:
    """Applies a block to tokens (N, w) and returns only the end-of-text tokens (P, w), in the order of the prompts."""
    layer, keys_and_values, normed = block.attn, slice(x.shape[1], None), block.ln_1(x)
    heads = [list(_heads(layer, piece)) for piece in packing.by_token(_project(layer, normed, keys_and_values))]
    before = 0
    if start is not None:
        before = start.shape[1]
        heads = _after(list(_heads(layer, _project(layer, block.ln_1(start), keys_and_values))), heads, packing)
    (queries,) = _heads(layer, _project(layer, packing.end_tokens(normed)[:, None], slice(x.shape[1])))
    seen = []
    for q, (k, v), ends in zip(packing.by_prompt(queries), heads, packing.by_prompt(packing.ends), strict=True):
        mask = torch.arange(k.shape[2], device=x.device) <= (before + ends)[:, None]
        seen.append(attention(q, k, v, mask[:, None, None]))
    return packing.unsorted(_rest(block, packing.end_tokens(x), _tokens(seen)))


def _after(first: list[Tensor], groups: list[list[Tensor]], packing: _Packing) -> list[list[Tensor]]:
    """Inserts keys and values of the common beginnings (G, heads, S, e) before those of each group of prompts."""
    owners = packing.by_prompt(packing.order // (len(packing.order) // len(first[0])))
    return [
        [torch.cat([beginning[own], rest], dim=2) for beginning, rest in zip(first, group, strict=True)]
        for own, group in zip(owners, groups, strict=True)
    ]


def _project(layer: Any, x: Tensor, rows: slice) -> Tensor:
    """Applies the given rows of the joint projection to queries, keys and values."""
    return F.linear(x, layer.in_proj_weight[rows], layer.in_proj_bias[rows])


def _heads(layer: Any, projected: Tensor) -> tuple[Tensor, ...]:
    """Splits projected tokens (B, L, n * w) into n tensors (B, heads, L, w / heads)."""
    heads = projected.view(*projected.shape[:2], -1, layer.num_heads, layer.head_dim)
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def _tokens(seen: list[Tensor]) -> Tensor:
    """Converts outputs (B, heads, L, w / heads) of the attention, one for each group, to tokens (N, w)."""
    return torch.cat([piece.transpose(1, 2).flatten(2).flatten(0, 1) for piece in seen])


def _rest(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Computes the part of a block after the attention: projection, feed-forward network and residual sums."""
    x = x + block.ls_1(block.attn.out_proj(seen))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x
