"""Transformer decoder blocks in numpy float64, image by image and head by head."""

from __future__ import annotations

import numpy as np


def _linear(x, weight, bias):
    return x @ weight.T + bias


def _norm(x, weights, name):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(queries, keys, values, weights, name, heads):
    """Attends from ``queries (C, d)`` to ``keys (n, d)``; returns mixed ``values`` and mean attention ``(C, n)``."""
    d = queries.shape[1]
    w, b = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    q, k, v = (
        _linear(x, w[i * d : (i + 1) * d], b[i * d : (i + 1) * d]) for i, x in enumerate([queries, keys, values])
    )
    mixed, maps = np.zeros_like(q), np.zeros((len(queries), len(keys)))
    width = d // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for c in range(len(queries)):
            scores = np.array([q[c, part] @ k[t, part] / np.sqrt(width) for t in range(len(keys))])
            share = np.exp(scores - scores.max())
            share /= share.sum()
            mixed[c, part] = share @ v[:, part]
            maps[c] += share / heads
    return _linear(mixed, weights[f"{name}.out_proj.weight"], weights[f"{name}.out_proj.bias"]), maps


def post_norm_block(queries, tokens, weights, heads):
    """Runs the standard block without self-attention on one image; ``weights`` in float64."""
    seen, maps = attend(queries, tokens, tokens, weights, "multihead_attn", heads)
    x = _norm(queries + seen, weights, "norm2")
    hidden = np.maximum(_linear(x, weights["linear1.weight"], weights["linear1.bias"]), 0)
    return _norm(x + _linear(hidden, weights["linear2.weight"], weights["linear2.bias"]), weights, "norm3"), maps


def _scaled(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


def decode(queries, local, places, blocks, heads):
    """Runs ``LabelDecoder`` on one image; ``blocks`` are float64 weights, with self-attention if present."""
    if len(queries) > 1:
        queries = queries - queries.mean(0)
    labels = x = _scaled(queries)
    keys, values = _scaled(places - places.mean(0)), _scaled(local + places)
    for weights in blocks:
        if "self_attention.in_proj_weight" in weights:
            y = _norm(x, weights, "norm1")
            x = x + attend(y, y, y, weights, "self_attention", heads)[0]
        seen, maps = attend(_norm(x, weights, "norm2") + labels, keys, values, weights, "cross_attention", heads)
        x = x + seen
        hidden = np.maximum(_linear(_norm(x, weights, "norm3"), weights["linear1.weight"], weights["linear1.bias"]), 0)
        x = x + _linear(hidden, weights["linear2.weight"], weights["linear2.bias"])
    return x, maps


def weights_of(block):
    """Returns the weights of a block in float64."""
    return {k: v.detach().double().numpy() for k, v in block.state_dict().items()}
