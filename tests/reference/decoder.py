"""A transformer decoder block in numpy float64, image by image and head by head."""

from __future__ import annotations

import numpy as np


def _linear(x, weight, bias):
    return x @ weight.T + bias


def _norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(queries, tokens, weights, name, heads):
    """``queries (C, d)`` look at ``tokens (n, d)``; gives the mixture and the mean attention ``(C, n)``."""
    d = queries.shape[1]
    w, b = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    q, k, v = (
        _linear(x, w[i * d : (i + 1) * d], b[i * d : (i + 1) * d]) for i, x in enumerate([queries, tokens, tokens])
    )
    mixed, maps = np.zeros_like(q), np.zeros((len(queries), len(tokens)))
    width = d // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for c in range(len(queries)):
            scores = np.array([q[c, part] @ k[t, part] / np.sqrt(width) for t in range(len(tokens))])
            share = np.exp(scores - scores.max())
            share /= share.sum()
            mixed[c, part] = share @ v[:, part]
            maps[c] += share / heads
    return _linear(mixed, weights[f"{name}.out_proj.weight"], weights[f"{name}.out_proj.bias"]), maps


def decode(queries, tokens, layers, heads):
    """Post-norm blocks on one image; ``layers`` are dicts of float64 weights. Self-attention where it has weights."""
    x = queries
    for weights in layers:
        if "self_attn.in_proj_weight" in weights:
            x = _norm(x + attend(x, x, weights, "self_attn", heads)[0], weights, "norm1")
        seen, maps = attend(x, tokens, weights, "multihead_attn", heads)
        x = _norm(x + seen, weights, "norm2")
        hidden = np.maximum(_linear(x, weights["linear1.weight"], weights["linear1.bias"]), 0)
        x = _norm(x + _linear(hidden, weights["linear2.weight"], weights["linear2.bias"]), weights, "norm3")
    return x, maps


def layers_of(decoder):
    """Weights of a ``LabelDecoder`` as :func:`decode` takes them."""
    return [{k: v.double().numpy() for k, v in layer.state_dict().items()} for layer in decoder.layers]
