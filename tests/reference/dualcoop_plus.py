"""DualCoOp++ with loops over images, regions and classes: evidence selects regions, in which classes compete."""

from __future__ import annotations

import math

import torch

from reference.regions import cosine, softmax, table, values


def won(similarities, normalized):
    """Returns the positive similarities of a region after the competition, as a list over classes."""
    best = max(similarities)
    weight = softmax([200 * c * best for c in similarities])
    if normalized:
        most = max(weight)
        return [c * w / most for c, w in zip(similarities, weight, strict=True)]
    return [c * (1 + w) for c, w in zip(similarities, weight, strict=True)]


def two_logits(features, weights, evidential, positive, negative, log_temperature, normalized):
    """Returns logits ``(B, C, 2)``, negative first, and attention of the classes ``(B, C, h * w)``."""
    classes, logits, shares = range(len(positive)), [], []
    for image in features:
        regions = values(image, weights, positions=False)[1:]
        yes = [won([cosine(region, positive[k]) for k in classes], normalized) for region in regions]
        logits.append([])
        shares.append([])
        for k in classes:
            evidence = softmax([torch.exp(log_temperature) * cosine(region, evidential[k]) for region in regions])
            against = sum(a * cosine(region, negative[k]) for a, region in zip(evidence, regions, strict=True))
            in_favor = sum(a * row[k] for a, row in zip(evidence, yes, strict=True))
            logits[-1].append([math.exp(3) * against, math.exp(3) * in_favor])
            shares[-1].append(evidence)
    return table(logits), table(shares)
