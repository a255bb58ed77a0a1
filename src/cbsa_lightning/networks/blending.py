"""Blending of the features of unknown labels with other features, trained with soft targets; used by SARB and DSRB.

Source: see :mod:`~cbsa_lightning.networks.prototypes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.networks.contrast import contrast
from cbsa_lightning.networks.hooks import Batch, Moment
from cbsa_lightning.networks.processes import mean_over
from cbsa_lightning.networks.prototypes import Prototypes


class Blending(Prototypes):
    """The loss terms of SARB and DSRB. Subclasses select the prototypes.

    - *instance*: An image is paired with the image at the mirrored position in the batch. If a label is unknown in the
      image and a known positive in the other image, its feature becomes ``alpha * own + (1 - alpha) * other`` and its
      target becomes ``1 - alpha``.
    - *prototype*: In each image, the feature of one random unknown label is blended with a prototype in the same way,
      with ``beta`` instead of ``alpha``.

    The blended features are classified, and the loss is computed for known and blended labels. Images without unknown
    labels are not blended. Before ``start_epoch``, only the contrast of label features contributes to the loss.

    Args:
        num_classes: C.
        dim: Size of a label feature.
        number: Number of prototypes per class.
        start_epoch: First epoch with blending.
        every: See :class:`~cbsa_lightning.networks.prototypes.Prototypes`.
        samples: See :class:`~cbsa_lightning.networks.prototypes.Prototypes`.
    """

    contrast_weight = 0.05

    def __init__(self, num_classes: int, dim: int, number: int, start_epoch: int, every: int, samples: int) -> None:
        super().__init__(num_classes, dim, number, start_epoch, every, samples)
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.beta = nn.Parameter(torch.tensor(0.5))

    def drawn(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Draws a prototype ``(B, C, d)`` for each label of the images of this process."""
        raise NotImplementedError

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """See :class:`TrainingHooks`."""
        generator = moment.generator()
        whole, labels = batch.whole.join(batch.features), batch.whole.join(batch.targets)
        ramp = min(moment.passed, 1.0)
        terms = {"contrast": self.contrast_weight * ramp * contrast(whole, labels, generator)}
        if moment.epoch < self.start_epoch:
            return terms
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
            self.beta.clamp_(0, 1)
        unknown = batch.targets < 0
        partner = len(batch.whole) - 1 - batch.whole.places
        mixed = unknown & (labels[partner] == 1)
        terms["instance"] = self._loss(network, batch, whole[partner], mixed, self.alpha)
        priority = torch.rand(len(batch.whole), batch.targets.shape[1], generator=generator).to(unknown.device)
        free = unknown & self.prototypes.any(-1).any(-1)
        priority = priority[batch.whole.places] * free
        chosen = F.one_hot(priority.argmax(1), free.shape[1]).bool() & free
        terms["prototype"] = self._loss(network, batch, self.drawn(batch, generator), chosen, self.beta)
        return terms

    @staticmethod
    def _loss(network: Any, batch: Batch, other: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Returns the cross-entropy after the features of ``chosen (B, C)`` are blended with ``other (B, C, d)``."""
        own = batch.features
        blended = torch.where(chosen[..., None], share * own + (1 - share) * other.to(own.dtype), own)
        logits = network.classify(blended)
        with torch.autocast(logits.device.type, enabled=False):
            x = logits.float()
            targets = torch.where(chosen, (1 - share).to(x.dtype), (batch.targets == 1).to(x.dtype))
            each = F.binary_cross_entropy_with_logits(x, targets, reduction="none")
        return mean_over(each, (batch.targets >= 0) | (chosen & (share < 1)))
