"""Pseudo-labels for unknown labels from what is known of the same image and of others; shared by SST and HST."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cbsa_lightning.networks.processes import mean_over


def known_loss(logits: Tensor, targets: Tensor, positive: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of a batch over its known labels and pseudo-positives.

    Args:
        logits: ``(B, C)``, this process's images.
        targets: ``(B, C)`` in {1, 0, -1 unknown}.
        positive: ``(B, C)`` bool, unknown labels that count as positive; None: none.
    """
    positive = torch.zeros_like(targets, dtype=torch.bool) if positive is None else positive & (targets < 0)
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.float()
        each = F.binary_cross_entropy_with_logits(x, ((targets == 1) | positive).to(x.dtype), reduction="none")
    return mean_over(each, (targets >= 0) | positive)


def mean_cosine(features: Tensor, examples: Tensor) -> Tensor:
    """Mean cosine ``(B, C)`` of label features ``(B, C, d)`` with the label's examples ``(C, n, d)``; float32.

    It is the dot product with the mean of the normalized examples; an example of zeros counts as 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=1e-9)
        center = F.normalize(examples.float(), dim=-1, eps=1e-9).mean(1)
        return (unit * center).sum(-1)


def remember(bank: Tensor, features: Tensor, targets: Tensor) -> None:
    """Puts the features of a batch's positives in front of a bank, in place.

    Args:
        bank: ``(C, n, d)``, latest examples of each label first.
        features: ``(B, C, d)`` of the whole batch; those that are not finite are left out.
        targets: ``(B, C)`` in {1, 0, -1}.
    """
    features = features.detach().to(bank.dtype)
    chosen = (targets == 1) & features.isfinite().all(-1)
    for k in chosen.any(0).nonzero()[:, 0].tolist():
        bank[k] = torch.cat([features[chosen[:, k], k], bank[k]])[: bank.shape[1]]
