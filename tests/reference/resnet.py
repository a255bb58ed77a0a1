"""The heads of the ImageNet network with loops over images, classes and positions, in float64."""

from __future__ import annotations

import numpy as np

from reference.decoder import post_norm_block


def linear(features, weight, bias):
    """Returns logits ``(B, C)`` of maps ``(B, D, h, w)``: weighted sums of the channels' means."""
    batch, channels, rows, columns = features.shape
    logits = np.zeros((batch, len(weight)))
    for b in range(batch):
        for k in range(len(weight)):
            for c in range(channels):
                mean = sum(features[b, c, i, j] for i in range(rows) for j in range(columns)) / (rows * columns)
                logits[b, k] += weight[k, c] * mean
            logits[b, k] += bias[k]
    return logits


def ml_decoder(features, weights, layer, heads):
    """Returns logits ``(B, C)`` and attention ``(B, C, h, w)`` from head ``weights`` and decoder block ``layer``."""
    batch, _, rows, columns = features.shape
    queries = np.array([_normed(query, weights["norm.weight"], weights["norm.bias"]) for query in weights["queries"]])
    logits, maps = np.zeros((batch, len(queries))), np.zeros((batch, len(queries), rows, columns))
    for b in range(batch):
        tokens = []
        for i in range(rows):
            for j in range(columns):
                token = weights["embed.weight"] @ features[b, :, i, j] + weights["embed.bias"]
                tokens.append(np.maximum(token, 0))
        found, attention = post_norm_block(queries, np.array(tokens), layer, heads)
        for k in range(len(queries)):
            logits[b, k] = (found[k] * weights["weight"][k]).sum() + weights["bias"][k]
            maps[b, k] = attention[k].reshape(rows, columns)
    return logits, maps


def _normed(x, weight, bias):
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * weight + bias


def slope(value, x, step=1e-5):
    """Returns the gradient of ``value()`` with respect to the array ``x`` by central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        kept = x[place]
        x[place] = kept + step
        above = value()
        x[place] = kept - step
        gradient[place] = (above - value()) / (2 * step)
        x[place] = kept
    return gradient
