"""HST: heterogeneous semantic transfer, with learned thresholds and prototypes (Chen et al., IJCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_lightning.arguments import check_number
from cbsa_lightning.networks.contrast import contrast
from cbsa_lightning.networks.gated_graph import LabelGraph
from cbsa_lightning.networks.hooks import Batch, Moment, Seen
from cbsa_lightning.networks.imagenet_weights import TIMM
from cbsa_lightning.networks.label_pairs import LabelPairs, pair_loss
from cbsa_lightning.networks.processes import mean_over
from cbsa_lightning.networks.prototypes import clustered, due, sampled_positives
from cbsa_lightning.networks.ssgrl import SSGRL
from cbsa_lightning.networks.transfer import known_loss, mean_cosine
from cbsa_lightning.networks.word_vectors import ClipWords, WordVectorsCallable


class HST(SSGRL):
    """SST with prototypes instead of its bank, and with learned margins.

    The probability or cosine minus its margin, clamped to [0, 1], is the score of a label. An unknown label with a
    score above 0 counts as positive. A cross-entropy on the scores of known labels trains margins, pairs and features.

    Source: repository HCPLab-SYSU/HCP-MLR-PL. Differences: the loss on prototypes is ``1 - cosine`` for known
    positives and ``1 + cosine`` for known negatives, where the released code has the opposite signs, which push
    positives away from their own prototypes; and prototypes are computed from a sample of the known positives. As
    in the original, the scores, within [0, 1], enter their cross-entropy as logits. The weights of the terms are
    constants of :class:`LearnedTransfer`.

    Args:
        class_names: The C class names, for word vectors.
        backbone: See :class:`SSGRL`.
        pretrained: See :class:`SSGRL`.
        words: See :class:`SSGRL`.
        dim: Size of a label feature.
        attention_width: Size of the projections of map, word vectors and pairs.
        steps: Number of updates of the graph network.
        start_epoch: First epoch with pseudo-positives.
        prototypes: Prototypes per class, the centers of k-means.
        every: Epochs between two computations of the prototypes.
        samples: Maximum number of known positives per class for its prototypes.

    Raises:
        ConfigError: The backbone is not a ResNet, or a setting is outside of its bounds.
        WeightsError: Weights or word vectors are not available.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: str = "resnet101.tv_in1k",
        pretrained: str | None = TIMM,
        words: WordVectorsCallable = ClipWords,
        dim: int = 1024,
        attention_width: int = 512,
        steps: int = 3,
        start_epoch: int = 5,
        prototypes: int = 10,
        every: int = 5,
        samples: int = 1000,
    ) -> None:
        super().__init__(class_names, backbone, pretrained, words, dim, attention_width, steps)
        self.pairs = LabelPairs(len(class_names), dim, attention_width)
        self.hooks = LearnedTransfer(len(class_names), dim, prototypes, start_epoch, every, samples)


class LearnedTransfer(LabelGraph):
    """The terms that HST adds to the loss, its prototypes and its margins.

    Args:
        num_classes: C.
        dim: Size of a label feature.
        number: Prototypes per class.
        start_epoch: See :class:`HST`.
        every: See :class:`HST`.
        samples: See :class:`HST`.
    """

    prototypes: Tensor
    cooccurrence_weight, contrast_weight, prototype_weight, margin_weight = 10.0, 0.05, 0.05, 0.1

    def __init__(self, num_classes: int, dim: int, number: int, start_epoch: int, every: int, samples: int) -> None:
        super().__init__()
        for name, value, least in (("start_epoch", start_epoch, 0), ("every", every, 1), ("samples", samples, 1)):
            check_number(name, value, least, whole=True)
        check_number("prototypes", number, 1, whole=True)
        self.start_epoch, self.every, self.samples = start_epoch, every, samples
        self.register_buffer("prototypes", torch.zeros(num_classes, number, dim))
        self.within_margin = nn.Parameter(torch.tensor(1.0))
        self.across_margin = nn.Parameter(torch.tensor(1.0))

    def idle(self, moment: Moment) -> bool:
        """Returns whether the epoch is before the first one with prototypes."""
        return moment.epoch < self.start_epoch

    def wanted(self, labels: Tensor, moment: Moment) -> Tensor | None:
        """Selects known positives in epochs that compute prototypes."""
        if not due(moment, self.start_epoch, self.every):
            return None
        return sampled_positives(labels, self.samples, moment)

    def before_epoch(self, seen: Seen, moment: Moment) -> None:
        """Computes the prototypes."""
        num_classes, number, _ = self.prototypes.shape
        self.prototypes.copy_(clustered(seen, num_classes, number, moment))

    def terms(self, network: Any, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """See :class:`TrainingHooks`."""
        logits, features, targets = batch.output.logits, batch.features, batch.targets
        whole, labels = batch.whole.join(features), batch.whole.join(targets)
        found = network.pairs(features)
        together = pair_loss(found, network.pairs.targets(targets))
        every = torch.ones_like(targets, dtype=torch.bool)
        ramp = min(moment.passed, 1.0)
        terms = {
            "cooccurrence": self.cooccurrence_weight * ramp * mean_over(together, torch.ones_like(together).bool()),
            "contrast": self.contrast_weight * ramp * contrast(whole, labels, moment.generator()),
        }
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
