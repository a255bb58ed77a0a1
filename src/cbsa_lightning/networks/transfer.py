"""Pseudo-labels for unknown labels, based on known labels of the same image and of others; used by SST and HST."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cbsa_lightning.networks.contrast import contrast
from cbsa_lightning.networks.hooks import Batch, Moment
from cbsa_lightning.networks.label_pairs import pair_loss
from cbsa_lightning.networks.processes import mean_over

COOCCURRENCE_WEIGHT, CONTRAST_WEIGHT = 10.0, 0.05


def pair_terms(
    network: Any, batch: Batch, moment: Moment, whole: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns pair logits of a batch and the loss terms without pseudo-labels (co-occurrence and contrast).

    The weights of the terms increase linearly during the first epoch.

    Args:
        network: A network with ``pairs``, a :class:`~cbsa_lightning.networks.label_pairs.LabelPairs`.
        batch: The batch of the step.
        moment: The position of the step in the run.
        whole: Label features of the batches of all processes.
        labels: Targets of the batches of all processes.
    """
    found = network.pairs(batch.features)
    together = pair_loss(found, network.pairs.targets(batch.targets))
    ramp = min(moment.passed, 1.0)
    return found, {
        "cooccurrence": COOCCURRENCE_WEIGHT * ramp * mean_over(together, torch.ones_like(together).bool()),
        "contrast": CONTRAST_WEIGHT * ramp * contrast(whole, labels, moment.generator()),
    }


def known_loss(logits: Tensor, targets: Tensor, positive: Tensor | None = None) -> Tensor:
    """Returns the mean binary cross-entropy over the known labels and pseudo-positives of a batch.

    Args:
        logits: ``(B, C)``, logits of the images of this process.
        targets: ``(B, C)`` in {1, 0, -1 unknown}.
        positive: ``(B, C)`` bool, the unknown labels that count as positive, or None.
    """
    positive = torch.zeros_like(targets, dtype=torch.bool) if positive is None else positive & (targets < 0)
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.float()
        each = F.binary_cross_entropy_with_logits(x, ((targets == 1) | positive).to(x.dtype), reduction="none")
    return mean_over(each, (targets >= 0) | positive)


def mean_cosine(features: Tensor, examples: Tensor) -> Tensor:
    """Returns the mean cosine ``(B, C)`` of label features ``(B, C, d)`` and examples ``(C, n, d)`` in float32.

    It is computed as the dot product with the mean of the normalized examples. The cosine of a zero vector is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=1e-9)
        center = F.normalize(examples.float(), dim=-1, eps=1e-9).mean(1)
        return (unit * center).sum(-1)


def remember(bank: Tensor, features: Tensor, targets: Tensor) -> None:
    """Inserts the features of known positives at the front of a bank, in place.

    Args:
        bank: ``(C, n, d)``, examples of each label, starting with the most recent ones.
        features: ``(B, C, d)`` of the whole batch. Features that are not finite are skipped.
        targets: ``(B, C)`` in {1, 0, -1}.
    """
    features = features.detach().to(bank.dtype)
    chosen = (targets == 1) & features.isfinite().all(-1)
    for k in chosen.any(0).nonzero()[:, 0].tolist():
        bank[k] = torch.cat([features[chosen[:, k], k], bank[k]])[: bank.shape[1]]
