"""Regions of an image in CLIP's joint space, one by one, and helpers for references of prompted networks.

These are plain loops in float64 torch, so that autograd computes the reference's gradients too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class Weights(NamedTuple):
    """Weights of an attention pool; a layer is ``(weight, bias or None)``."""

    query: tuple
    key: tuple
    value: tuple
    out: list[tuple]
    positions: Any
    heads: int


def _layer(linear):
    return linear.weight.detach().double(), None if linear.bias is None else linear.bias.detach().double()


def resnet_weights(attnpool):
    """Returns the weights of open_clip's ``AttentionPool2d``, or of this library's pool with the same layers."""
    query, key, value = (_layer(linear) for linear in (attnpool.q_proj, attnpool.k_proj, attnpool.v_proj))
    positions = attnpool.positional_embedding.detach().double()
    return Weights(query, key, value, [_layer(attnpool.c_proj)], positions, attnpool.num_heads)


def timm_weights(head):
    """Returns the weights of open_clip's head on a timm trunk, without rotary positions, which do not affect values."""
    weight, bias = _layer(head.pool.qkv)
    parts = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
    out = [_layer(linear) for linear in (head.pool.proj, getattr(head, "proj", None)) if linear is not None]
    positions = head.pool.pos_embed.detach().double() if torch.is_tensor(head.pool.pos_embed) else None
    return Weights(*parts, out, positions, head.pool.num_heads)


def _apply(layers, x):
    for weight, bias in layers:
        x = weight @ x if bias is None else weight @ x + bias
    return x


def _cubic(distance, a=-0.75):
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _taps(place, native, wanted):
    """Returns native places, clamped at the border, and their bicubic weights for one target place."""
    center = (place + 0.5) * native / wanted - 0.5
    first = math.floor(center) - 1
    return [(min(max(i, 0), native - 1), _cubic(center - i)) for i in range(first, first + 4)]


def position(positions, row, column, height, width):
    """Returns the position ``(c,)`` of a place in a ``height x width`` grid; row 0 of ``positions`` is the mean."""
    side = math.isqrt(len(positions) - 1)
    if (height, width) == (side, side):
        return positions[1 + row * side + column]
    result = torch.zeros_like(positions[0])
    for i, vertical in _taps(row, side, height):
        for j, horizontal in _taps(column, side, width):
            result = result + vertical * horizontal * positions[1 + i * side + j]
    return result


def inputs(image, weights, positions):
    """Returns the inputs of the pool's projections for a map ``(c, h, w)``: its mean, then its places row by row."""
    _, height, width = image.shape
    places = [image[:, i, j] for i in range(height) for j in range(width)]
    mean = sum(places) / len(places)
    if not positions or weights.positions is None:
        return [mean, *places]
    shifts = [position(weights.positions, i, j, height, width) for i in range(height) for j in range(width)]
    return [mean + weights.positions[0]] + [x + shift for x, shift in zip(places, shifts, strict=True)]


def values(image, weights, positions):
    """Computes the value path: each region's projected value, without other regions; the mean comes first."""
    return [_apply([weights.value, *weights.out], x) for x in inputs(image, weights, positions)]


def attended(image, weights, positions):
    """Computes the ordinary pool: attention of each region over all values, by heads; the global one comes first."""
    x = inputs(image, weights, positions)
    q, k, v = ([_apply([layer], one) for one in x] for layer in (weights.query, weights.key, weights.value))
    width, result = len(v[0]) // weights.heads, []
    for t in range(len(x)):
        mixed = []
        for h in range(weights.heads):
            part = slice(h * width, (h + 1) * width)
            shares = softmax([q[t][part] @ other[part] / math.sqrt(width) for other in k])
            mixed.append(sum(share * other[part] for share, other in zip(shares, v, strict=True)))
        result.append(_apply(weights.out, torch.cat(mixed)))
    return result


def softmax(scores):
    """Returns the softmax of a list of scalars."""
    top = max(float(score.detach()) for score in scores)
    powers = [torch.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def cosine(a, b):
    """Returns the cosine of two vectors."""
    return (a @ b) / (torch.sqrt(a @ a) * torch.sqrt(b @ b))


def table(rows):
    """Converts nested lists of scalars to one tensor."""
    return torch.stack([table(row) for row in rows]) if isinstance(rows, list) else rows


def assert_near(actual, expected, tolerance=1e-4):
    """Compares float32 with float64, relative to the largest expected entry."""
    assert actual.shape == expected.shape
    limit = tolerance * float(expected.detach().abs().max())
    assert limit > 0
    torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=0)
