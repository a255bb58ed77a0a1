"""HST: heterogeneous semantic transfer, with learned thresholds and prototypes (Chen et al., IJCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.hooks import Batch, Moment
from cbsa_lightning.networks.label_pairs import LabelPairs
from cbsa_lightning.networks.processes import mean_over
from cbsa_lightning.networks.prototypes import Prototypes
from cbsa_lightning.networks.ssgrl import SSGRL
from cbsa_lightning.networks.transfer import known_loss, mean_cosine, pair_terms


class HST(SSGRL):
    """SST with prototypes instead of a bank of examples, and with learned margins.

    The score of a label is its probability or cosine minus a margin, clamped to [0, 1]. An unknown label with a
    score above 0 counts as positive. A cross-entropy loss on the scores of known labels trains the margins, the pair
    logits and the features.

    Source: repository HCPLab-SYSU/HCP-MLR-PL. Differences: The loss on prototypes is ``1 - cosine`` for known positives
    and ``1 + cosine`` for known negatives. The released code has the opposite signs, which push positives away from
    their own prototypes. Prototypes are computed from a sample of the known positives. As in the original, the scores
    are used as logits in their cross-entropy, although they are in [0, 1]. The weights of the terms are constants of
    :class:`LearnedTransfer`.

    Args:
        class_names: The C class names, which determine the word vectors.
        dim: Size of a label feature.
        attention_width: Size of the projections of the map, the word vectors and the pairs.
        start_epoch: First epoch with pseudo-positives.
        prototypes: Number of prototypes per class. They are the centers of k-means.
        every: Number of epochs between two computations of the prototypes.
        samples: Maximum number of known positives per class that prototypes are computed from.
        **network: ``backbone``, ``pretrained``, ``words`` and ``steps`` of
            :class:`~cbsa_lightning.networks.ssgrl.SSGRL`.

    Raises:
        ConfigError: If the backbone is not a ResNet, or a setting is out of range.
        WeightsError: If the weights or the word vectors are not available.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        dim: int = 1024,
        attention_width: int = 512,
        start_epoch: int = 5,
        prototypes: int = 10,
        every: int = 5,
        samples: int = 1000,
        **network: Any,
    ) -> None:
        super().__init__(class_names, dim=dim, attention_width=attention_width, **network)
        self.pairs = LabelPairs(len(class_names), dim, attention_width)
        self.hooks = LearnedTransfer(len(class_names), dim, prototypes, start_epoch, every, samples)


class LearnedTransfer(Prototypes):
    """The loss terms, prototypes and margins of HST.

    Args:
        num_classes: C.
        dim: Size of a label feature.
        number: Number of prototypes per class.
        start_epoch: See :class:`HST`.
        every: See :class:`HST`.
        samples: See :class:`HST`.
    """

    prototype_weight, margin_weight = 0.05, 0.1

    def __init__(self, num_classes: int, dim: int, number: int, start_epoch: int, every: int, samples: int) -> None:
        super().__init__(num_classes, dim, number, start_epoch, every, samples)
        self.within_margin = nn.Parameter(torch.tensor(1.0))
        self.across_margin = nn.Parameter(torch.tensor(1.0))

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """See :class:`TrainingHooks`."""
        logits, features, targets = batch.output.logits, batch.features, batch.targets
        every = torch.ones_like(targets, dtype=torch.bool)
        whole, labels = batch.whole.join(features), batch.whole.join(targets)
        found, terms = pair_terms(network, batch, moment, whole, labels)
        if moment.epoch < self.start_epoch:
            return terms
        cosine = mean_cosine(features, self.prototypes)
        known = network.pairs.given_known(found.float(), targets)
        within, across = (known - self.within_margin).clamp(0, 1), (cosine - self.across_margin).clamp(0, 1)
        side = torch.where(targets < 0, 0, 2 * targets - 1)
        terms["within"] = known_loss(logits, targets, within.detach() > 0)
        terms["across"] = known_loss(logits, targets, across.detach() > 0)
        terms["within_margin"] = self.margin_weight * known_loss(within, targets)
        terms["across_margin"] = self.margin_weight * known_loss(across, targets)
        terms["prototype"] = self.prototype_weight * mean_over(1 - cosine * side, every)
        return terms
