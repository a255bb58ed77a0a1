"""DualCoOp with loops over images, classes and regions, with two logits and losses on their softmax."""

from __future__ import annotations

import torch

from reference.regions import cosine, softmax, table, values


def two_logits(features, weights, positive, negative, region_scale, scale):
    """Returns logits ``(B, C, 2)``, negative first, and attention of the classes ``(B, C, h * w)``.

    Attention depends only on positive similarities. The mean token counts as a region, but the returned attention
    omits it.
    """
    logits, shares = [], []
    for image in features:
        regions = values(image, weights, positions=True)
        logits.append([])
        shares.append([])
        for k in range(len(positive)):
            yes = [cosine(region, positive[k]) for region in regions]
            no = [cosine(region, negative[k]) for region in regions]
            weight = softmax([region_scale * c for c in yes])
            pair = [scale * sum(w * c for w, c in zip(weight, cosines, strict=True)) for cosines in (no, yes)]
            logits[-1].append(pair)
            shares[-1].append([w / sum(weight[1:]) for w in weight[1:]])
    return table(logits), table(shares)


def cross_entropy(logits, targets):
    """Sums ``-log`` of the softmax entry of each target; unknown targets (-1) are ignored."""
    total = torch.zeros((), dtype=torch.float64)
    for b, k in (targets >= 0).nonzero().tolist():
        total = total - torch.log(softmax(list(logits[b, k]))[int(targets[b, k])])
    return total


def asymmetric(logits, targets, gamma_pos, gamma_neg, clip):
    """DualCoOp's loss on the two softmax probabilities, with no gradient through the focal weights."""
    total = torch.zeros((), dtype=torch.float64)
    for b, k in (targets >= 0).nonzero().tolist():
        no, yes = softmax(list(logits[b, k]))
        right, gamma = (yes, gamma_pos) if targets[b, k] == 1 else (torch.clamp(no + clip, max=1), gamma_neg)
        total = total - (1 - right.detach()) ** gamma * torch.log(right)
    return total
