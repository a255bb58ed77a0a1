"""Eq. 5 and the context head with loops over images and classes, in float64."""

from __future__ import annotations

import numpy as np

from reference.decoder import decode


def logits(scale, global_tokens, local_tokens, places, target, semantic, blocks, heads):
    """Returns scaled cosines ``(B, C)`` of label-specific features and target text, and attention ``(B, C, HW)``.

    ``blocks`` None compares the global feature with every class instead.
    """
    result, maps = np.zeros((len(global_tokens), len(target))), []
    for b in range(len(global_tokens)):
        if blocks is None:
            aligned = [global_tokens[b]] * len(target)
        else:
            aligned, attention = decode(semantic, local_tokens[b], places[b], blocks, heads)
            maps.append(attention)
        for k in range(len(target)):
            norms = np.sqrt((aligned[k] ** 2).sum()) * np.sqrt((target[k] ** 2).sum())
            result[b, k] = scale * sum(aligned[k] * target[k]) / norms
    return result, np.array(maps)
