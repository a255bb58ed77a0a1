"""Contrast of label features between the images of a batch.

Source: "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels" (SST; Chen et al., AAAI 2022),
repository HCPLab-SYSU/HCP-MLR-PL.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast(features: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Brings features of a label closer where both images have it, and apart where one or both do not.

    With c the cosine of the features of a label in two images, a pair costs ``1 - c`` where both have the label, and
    ``1 + c`` where one has it and the other not, or neither has it; pairs with an unknown label cost nothing. Where
    there are p pairs of the first kind, of each other kind 2p random ones and the p that cost most count, and one may
    count twice. The mean is over all labels and pairs that count.

    Args:
        features: ``(B, C, d)`` of the whole batch.
        targets: ``(B, C)`` in {1, 0, -1 unknown}.
        generator: Chooses the random pairs; of the CPU.

    Returns:
        A scalar in float32, 0 where no pair is known.
    """
    first, second = torch.triu_indices(len(features), len(features), 1, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=1e-9).transpose(0, 1)
        cosine = (unit @ unit.transpose(1, 2))[:, first, second].T  # (pairs, C), never (pairs, C, d)
    a, b = targets[first], targets[second]
    alike = (1 - cosine)[(a == 1) & (b == 1)]
    unlike, neither = (1 + cosine)[(a >= 0) & (b >= 0) & (a != b)], (1 + cosine)[(a == 0) & (b == 0)]
    if len(alike):
        unlike, neither = (_some(part, len(alike), generator) for part in (unlike, neither))
    costs = torch.cat([alike, unlike, neither])
    return costs.mean() if len(costs) else cosine.sum() * 0.0


def _some(costs: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Twice ``number`` random entries and the ``number`` highest."""
    chosen = torch.randperm(len(costs), generator=generator)[: 2 * number].to(costs.device)
    return torch.cat([costs[chosen], costs.topk(min(number, len(costs))).values])
