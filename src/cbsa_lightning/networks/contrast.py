"""Contrastive loss between label features of different images in a batch.

Source: "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels" (SST; Chen et al., AAAI 2022),
repository HCPLab-SYSU/HCP-MLR-PL.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast(features: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Computes the contrastive loss over pairs of images that each have a feature of the same label.

    With c the cosine of the two features, the loss of a pair is ``1 - c`` if both images have the label, and ``1 + c``
    if only one of them or neither has it. Pairs with an unknown label are ignored. If there are p > 0 pairs of images
    that both have the label, only 3p pairs are kept of each other kind (only one image, neither image): 2p random pairs
    and the p pairs with the highest loss. A pair may be kept twice.

    Args:
        features: Label features ``(B, C, d)`` of the whole batch.
        targets: ``(B, C)`` in {1, 0, -1 unknown}.
        generator: CPU generator that selects the random pairs.

    Returns:
        The mean loss of all remaining pairs over all labels, a float32 scalar. It is 0 if there are none.
    """
    first, second = torch.triu_indices(len(features), len(features), 1, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=1e-9).transpose(0, 1)
        cosine = (unit @ unit.transpose(1, 2))[:, first, second].T  # (pairs, C); tensors (pairs, C, d) are avoided
    a, b = targets[first], targets[second]
    alike = (1 - cosine)[(a == 1) & (b == 1)]
    unlike, neither = (1 + cosine)[(a >= 0) & (b >= 0) & (a != b)], (1 + cosine)[(a == 0) & (b == 0)]
    if len(alike):
        unlike, neither = (_some(part, len(alike), generator) for part in (unlike, neither))
    costs = torch.cat([alike, unlike, neither])
    return costs.mean() if len(costs) else cosine.sum() * 0.0


def _some(costs: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Returns ``2 * number`` random entries and the ``number`` highest entries."""
    chosen = torch.randperm(len(costs), generator=generator)[: 2 * number].to(costs.device)
    return torch.cat([costs[chosen], costs.topk(min(number, len(costs))).values])
