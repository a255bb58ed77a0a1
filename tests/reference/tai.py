"""TaI's two prompts on images with loops: the mean of the global score and the score of the best positions."""

from __future__ import annotations

import torch

from reference.regions import attended, cosine, softmax, table, values


def logits(features, weights, global_text, local_text, region_scale, log_scale):
    """Returns logits ``(B, C)`` and attention of the classes ``(B, C, h * w)``, without positions."""
    result, shares = [], []
    for image in features:
        whole = attended(image, weights, positions=False)[0]
        places = values(image, weights, positions=False)[1:]
        result.append([])
        shares.append([])
        for k in range(len(global_text)):
            similar = [cosine(place, local_text[k]) for place in places]
            weight = softmax([region_scale * c for c in similar])
            local = sum(w * c for w, c in zip(weight, similar, strict=True))
            result[-1].append(torch.exp(log_scale) * (0.5 * cosine(whole, global_text[k]) + 0.5 * local))
            shares[-1].append(weight)
    return table(result), table(shares)
