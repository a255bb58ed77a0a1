"""DualCoOp by loops over images, classes and regions, with its own two logits, and losses on their softmax."""

from __future__ import annotations

import torch

from reference.regions import cosine, softmax, table, values


def two_logits(features, weights, positive, negative, region_scale, scale):
    """Logits ``(B, C, 2)``, negative first, and each class's shares of the places ``(B, C, h * w)``.

    Positive similarities alone say which regions count. The mean token is a region like any other; the shares leave
    it out.
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
    """Sum of ``-log`` of the softmax's entry that each target names; unknown (-1) counts nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for b, k in (targets >= 0).nonzero().tolist():
        total = total - torch.log(softmax(list(logits[b, k]))[int(targets[b, k])])
    return total


def asymmetric(logits, targets, gamma_pos, gamma_neg, clip):
    """DualCoOp's loss on the two softmax probabilities, focal weights held constant for the gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for b, k in (targets >= 0).nonzero().tolist():
        no, yes = softmax(list(logits[b, k]))
        right, gamma = (yes, gamma_pos) if targets[b, k] == 1 else (torch.clamp(no + clip, max=1), gamma_neg)
        total = total - (1 - right.detach()) ** gamma * torch.log(right)
    return total
