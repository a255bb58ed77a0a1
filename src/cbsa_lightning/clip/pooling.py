"""Attention pools for open_clip's image towers that return all tokens (paper Eq. 3).

Each pool reuses the layers of an open_clip pool, with the same names and in the same order. Token 0 is therefore
bit-identical to open_clip's image embedding. The other tokens, which open_clip computes and discards, are the local
features in the same space.

Each pool also provides the *value path* that DualCoOp and its successors use. It applies only the value and output
projections, so each token describes only its own place.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d, RotAttentionPool2d, apply_rot_embed_cat
from torch import Tensor, nn

from cbsa_lightning.attention import attention
from cbsa_lightning.errors import ConfigError


class ImageTokens(NamedTuple):
    """One global and h*w local features per image, in CLIP's joint space and not normalized.

    Attributes:
        g: (B, d) global features, equal to the output of open_clip's ``encode_image``.
        l: (B, h*w, d) local features, row by row from the top left corner.
        grid: (h, w).
    """

    g: Tensor
    l: Tensor  # noqa: E741 (the paper's letter)
    grid: tuple[int, int]


def resize_positions(positions: Tensor, native: tuple[int, int], grid: tuple[int, int], antialias: bool) -> Tensor:
    """Resizes learned positions to another grid with bicubic interpolation. The first row is left unchanged.

    Args:
        positions: (1 + h*w, c). The first row belongs to the class token or the mean token.
        native: Grid (h, w) that the positions were learned for. For this grid, they are returned unchanged.
        grid: Target grid (h, w).
        antialias: Whether to use the antialiased bicubic filter, which gives different results even when enlarging.
            timm and open_clip's ViT use it. The CLIP ResNets of the multi-label literature do not (DualCoOp, which the
            paper builds on).

    Returns:
        (1 + h*w, c) for the target grid, differentiable with respect to ``positions``.
    """
    if grid == native:
        return positions
    grid_rows = positions[1:].T.reshape(1, -1, *native).float()
    resized = F.interpolate(grid_rows, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:1], resized[0].flatten(1).T.to(positions.dtype)])


class _Positioned:
    """Sum of image tokens and learned positions, used as the input of a linear layer.

    All images share the positions. If the tokens do not require gradients, as with a frozen tower, the gradient of the
    positions is summed over the images before it is multiplied by the layer's weights, not afterwards. This saves one
    of the three large matrix products of each layer in a training step. Outputs are bit-identical.

    Args:
        tokens: (..., c) tokens of the images.
        positions: Positions that can be broadcast to ``tokens``, or None.
    """

    def __init__(self, tokens: Tensor, positions: Tensor | None) -> None:
        self.sum = tokens if positions is None else tokens + positions
        self.learned = None if positions is None or tokens.requires_grad else positions

    def through(self, layer: nn.Linear) -> Tensor:
        """Computes ``layer(tokens + positions)``."""
        if self.learned is None or not self.learned.requires_grad:
            return cast(Tensor, layer(self.sum))
        carrier = F.linear(self.learned, layer.weight.detach())
        # The difference is zero. It only passes the gradient to the positions.
        return cast(Tensor, layer(self.sum.detach()) + (carrier - carrier.detach()))


class ResNetPool(nn.Module):
    """Dense attention pool of CLIP's ModifiedResNet, which converts a map (B, c, h, w) to :class:`ImageTokens`.

    Args:
        attnpool: The layer of open_clip. Its parameters keep their names.
    """

    def __init__(self, attnpool: nn.Module) -> None:
        super().__init__()
        source: Any = attnpool
        self.positional_embedding: nn.Parameter = source.positional_embedding
        self.q_proj: nn.Linear = source.q_proj
        self.k_proj: nn.Linear = source.k_proj
        self.v_proj: nn.Linear = source.v_proj
        self.c_proj: nn.Linear = source.c_proj
        self.num_heads = int(source.num_heads)
        side = math.isqrt(self.positional_embedding.shape[0] - 1)
        self.native_grid = (side, side)

    def forward(self, features: Tensor, positions: bool = True) -> ImageTokens:
        """Pools the tower's last map (B, c, h, w), for any grid and floating type. TaI omits ``positions``."""
        x = self._tokens(features, positions)
        return self._projected(self._mixed(x, x.through(self.v_proj)), _grid(features))

    def values(self, features: Tensor, positions: bool = True) -> ImageTokens:
        """Computes the value path, in which attention does not mix the tokens and ``g`` is the mean token."""
        return self._projected(self._tokens(features, positions).through(self.v_proj), _grid(features))

    def both(self, features: Tensor) -> tuple[ImageTokens, ImageTokens]:
        """Computes :meth:`forward` and :meth:`values` in one pass."""
        x, grid = self._tokens(features, True), _grid(features)
        v = x.through(self.v_proj)
        return self._projected(self._mixed(x, v), grid), self._projected(v, grid)

    def _tokens(self, features: Tensor, positions: bool) -> _Positioned:
        """Returns the mean token and the tokens of all places, (1 + hw, B, c), in open_clip's order."""
        learned, grid = self.positional_embedding, _grid(features)
        x = features.to(learned.dtype).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x])
        if not positions:
            return _Positioned(x, None)
        return _Positioned(x, resize_positions(learned, self.native_grid, grid, antialias=False)[:, None])

    def _mixed(self, x: _Positioned, v: Tensor) -> Tensor:
        """Applies self-attention of the tokens ``x`` to the values ``v``, both (1 + hw, B, c)."""
        q, k, v = (self._heads(part) for part in (x.through(self.q_proj), x.through(self.k_proj), v))
        return attention(q, k, v).permute(2, 0, 1, 3).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).permute(1, 2, 0, 3)  # (B, heads, 1 + hw, c / heads)

    def _projected(self, x: Tensor, grid: tuple[int, int]) -> ImageTokens:
        tokens: Tensor = self.c_proj(x)
        return ImageTokens(tokens[0], tokens[1:].transpose(0, 1), grid)


class TimmPool(nn.Module):
    """Dense form of timm's attention pools with absolute or rotary positions, for maps (B, c, h, w).

    Args:
        head: open_clip's head of a timm tower, which consists of ``pool`` and optionally a projection. The projection
            is applied to every token.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        layers = dict(head.named_children())
        self.attention: Any = layers.pop("pool")
        self.after = nn.Sequential(*layers.values())

    def forward(self, features: Tensor, positions: bool = True) -> ImageTokens:
        """Pools the trunk's last map (B, c, h, w), for any grid and floating type. TaI omits ``positions``."""
        mixed, _ = self._paths(features, positions)
        return self._projected(mixed, _grid(features))

    def values(self, features: Tensor, positions: bool = True) -> ImageTokens:
        """Computes the value path, where ``g`` is the mean token. Rotary positions do not affect it."""
        pool = self.attention
        x = self._tokens(features, positions)
        values = x.through(pool.v) if pool.qkv is None else x.through(pool.qkv).chunk(3, dim=-1)[2]
        return self._projected(values, _grid(features))

    def both(self, features: Tensor) -> tuple[ImageTokens, ImageTokens]:
        """Computes :meth:`forward` and :meth:`values` in one pass."""
        mixed, values = self._paths(features, True)
        return self._projected(mixed, _grid(features)), self._projected(values, _grid(features))

    def _paths(self, features: Tensor, positions: bool) -> tuple[Tensor, Tensor]:
        """Returns the tokens after self-attention and their values, both (B, 1 + hw, c)."""
        pool = self.attention
        x = self._tokens(features, positions)
        fused = pool.qkv is not None
        parts = (
            x.through(pool.qkv).chunk(3, dim=-1) if fused else [x.through(layer) for layer in (pool.q, pool.k, pool.v)]
        )
        q, k, v = (part.view(*part.shape[:2], pool.num_heads, -1).transpose(1, 2) for part in parts)
        if positions and isinstance(pool, RotAttentionPool2d):
            grid = _grid(features)
            q, k = self._rotate(q, grid).type_as(v), self._rotate(k, grid).type_as(v)
        return attention(q, k, v).transpose(1, 2).flatten(2), parts[2]

    def _tokens(self, features: Tensor, positions: bool) -> _Positioned:
        """Returns the mean token and the tokens of all places, (B, 1 + hw, c)."""
        pool = self.attention
        x = features.to(pool.proj.weight.dtype).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        if not positions or not isinstance(pool, AttentionPool2d):
            return _Positioned(x, None)
        return _Positioned(x, resize_positions(pool.pos_embed, pool.feat_size, _grid(features), antialias=True))

    def _projected(self, x: Tensor, grid: tuple[int, int]) -> ImageTokens:
        tokens = self.attention.proj(x)
        return ImageTokens(self.after(tokens[:, 0]), self.after(tokens[:, 1:]), grid)

    def _rotate(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        angles = self.attention.pos_embed.get_embed(grid)
        angles = torch.cat(angles, dim=-1) if isinstance(angles, tuple) else angles
        half = getattr(self.attention, "rotate_half", False)  # timm before 1.0.31 does not have this attribute
        rotated = apply_rot_embed_cat(x[:, :, 1:], angles, half=half)
        return torch.cat([x[:, :, :1], rotated], dim=2)  # the mean token has no position


class ViTPool(nn.Module):
    """Last norm and projection of a CLIP ViT, applied to all tokens (B, 1 + h*w, c).

    Args:
        visual: open_clip's VisionTransformer.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        source: Any = visual
        self.ln_post: nn.Module = source.ln_post
        self.proj: nn.Parameter = source.proj

    def forward(self, features: Tensor, positions: bool = True) -> ImageTokens:
        """Projects the tokens (B, 1 + h*w, c) of the last block. They include positions, and h = w."""
        x = self.ln_post(features.to(self.proj.dtype))
        side = math.isqrt(features.shape[1] - 1)
        # The class token is multiplied separately, as in open_clip, because the last bits of a matrix product depend on
        # its number of rows.
        return ImageTokens(x[:, 0] @ self.proj, x[:, 1:] @ self.proj, (side, side))

    def values(self, features: Tensor, positions: bool = True) -> ImageTokens:
        """Returns the result of :meth:`forward`, since a ViT has no attention pool."""
        return self.forward(features)

    def both(self, features: Tensor) -> tuple[ImageTokens, ImageTokens]:
        """Returns the result of :meth:`forward` twice; see :meth:`values`."""
        tokens = self.forward(features)
        return tokens, tokens


def _grid(features: Tensor) -> tuple[int, int]:
    return features.shape[-2], features.shape[-1]


Pool = ResNetPool | TimmPool | ViTPool


def dense_pool(visual: nn.Module) -> Pool:
    """Returns the pool for an open_clip image tower.

    Raises:
        ConfigError: If the tower has no pool whose tokens are in the joint space.
    """
    tower: Any = visual
    attnpool, head = getattr(tower, "attnpool", None), getattr(tower, "head", None)
    pool = getattr(head, "pool", None)
    if hasattr(attnpool, "c_proj"):
        return ResNetPool(tower.attnpool)
    if isinstance(pool, (AttentionPool2d, RotAttentionPool2d)) and pool.cls_token is None:
        return TimmPool(tower.head)
    is_vit = hasattr(tower, "ln_post") and hasattr(tower, "class_embedding")
    if is_vit and tower.attn_pool is None and tower.pool_type == "tok":
        return ViTPool(tower)
    found = type(tower).__name__
    if hasattr(tower, "trunk"):
        found += f" over {type(tower.trunk).__name__} with pool {'of its own' if pool is None else type(pool).__name__}"
    elif is_vit:
        found += f" with pool_type {tower.pool_type!r} and attn_pool {type(tower.attn_pool).__name__}"
    raise ConfigError(
        f"image tower {found} has no local features in CLIP's joint space (Eq. 3). Supported towers: CLIP ResNets "
        "(RN50, RN101, RN50x4 ...), timm towers with timm_pool 'abs_attn' or 'rot_attn', and open_clip ViTs with "
        "pool_type 'tok' and without an attentional pool (ViT-B-32, ViT-B-16, ViT-L-14 ...)."
    )
