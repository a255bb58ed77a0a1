"""SST: structured semantic transfer within an image and across images (Chen et al., AAAI 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cbsa_lightning.arguments import check_number
from cbsa_lightning.networks.gated_graph import LabelGraph
from cbsa_lightning.networks.hooks import Batch, Moment
from cbsa_lightning.networks.label_pairs import LabelPairs
from cbsa_lightning.networks.ssgrl import SSGRL
from cbsa_lightning.networks.transfer import known_loss, mean_cosine, pair_terms, remember


class SST(SSGRL):
    """SSGRL on a narrower map, with pseudo-positives for unknown labels.

    An unknown label counts as positive in a second cross-entropy loss if it probably co-occurs with the known positives
    of its image (:class:`~cbsa_lightning.networks.label_pairs.LabelPairs`). It counts as positive in a third one if its
    feature is similar to recent known positives in other images.

    Source: repository HCPLab-SYSU/HCP-MLR-PL. The weights of the loss terms are constants of :class:`Transfer`.

    Args:
        class_names: The C class names, which determine the word vectors.
        dim: Size of a label feature.
        attention_width: Size of the projections of the map, the word vectors and the pairs.
        start_epoch: First epoch with pseudo-positives.
        bank: Number of stored known positives per label.
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
        bank: int = 100,
        **network: Any,
    ) -> None:
        super().__init__(class_names, dim=dim, attention_width=attention_width, **network)
        self.pairs = LabelPairs(len(class_names), dim, attention_width)
        self.hooks = Transfer(len(class_names), dim, start_epoch, bank)


class Transfer(LabelGraph):
    """The loss terms of SST, and its bank of known positives.

    Args:
        num_classes: C.
        dim: Size of a label feature.
        start_epoch: See :class:`SST`.
        bank: See :class:`SST`.
    """

    bank: Tensor
    highest_margin, lowest_margin, margin_step = 0.95, 0.75, 0.025  # the margin decreases by one step per epoch

    def __init__(self, num_classes: int, dim: int, start_epoch: int, bank: int) -> None:
        super().__init__()
        check_number("start_epoch", start_epoch, 0, whole=True)
        check_number("bank", bank, 1, whole=True)
        self.start_epoch = start_epoch
        self.register_buffer("bank", torch.zeros(num_classes, bank, dim))

    def margin(self, epoch: int) -> float:
        """Returns the minimum probability and cosine for which an unknown label counts as positive."""
        return max(self.lowest_margin, self.highest_margin - self.margin_step * (epoch - self.start_epoch))

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """See :class:`TrainingHooks`."""
        logits, features, targets = batch.output.logits, batch.features, batch.targets
        whole, labels = batch.whole.join(features), batch.whole.join(targets)
        remember(self.bank, whole, labels)
        found, terms = pair_terms(network, batch, moment, whole, labels)
        if moment.epoch >= self.start_epoch:
            margin = self.margin(moment.epoch)
            within = network.pairs.given_known(found.detach(), targets) >= margin
            across = mean_cosine(features.detach(), self.bank) >= margin
            terms["within"] = known_loss(logits, targets, within)
            terms["across"] = known_loss(logits, targets, across)
        return terms
