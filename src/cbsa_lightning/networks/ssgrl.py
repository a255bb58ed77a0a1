"""SSGRL: class-specific features that are propagated over a co-occurrence graph (Chen et al., ICCV 2019).

Four systems for partial labels from the same group (SST, SARB, HST, DSRB) add terms to the loss of this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.networks.decoupling import SemanticDecoupling
from cbsa_lightning.networks.gated_graph import GatedGraph, LabelGraph
from cbsa_lightning.networks.imagenet_weights import TIMM
from cbsa_lightning.networks.partly_frozen import PartlyFrozenResNet
from cbsa_lightning.networks.word_vectors import ClipWords, WordVectorsCallable


class SSGRL(Network):
    """SSGRL, which consists of semantic decoupling, a gated graph network, and a linear classifier for each class.

    Source: repository HCPLab-SYSU/SSGRL. Differences: The graph is computed from the known positives of the run instead
    of read from a file. Unknown labels do not contribute to the loss (``MeanBinaryCrossEntropy``), as in the
    comparisons for partial labels.

    Args:
        class_names: The C class names, which determine the word vectors.
        backbone: Name of a timm ResNet, including the tag of its weights. Only its last stage is trained.
        pretrained: "timm" for the weights of the tag, a weights file, or "random".
        words: Class that creates the word vectors: ``GloVe`` with a file, or ``ClipWords``.
        dim: Number of channels of the map after a 1 x 1 convolution with batch norm. None leaves the map unchanged.
        attention_width: Size of the space that the map and the word vectors are projected to.
        steps: Number of updates of the graph network.

    Raises:
        ConfigError: If the backbone is not a ResNet.
        WeightsError: If the weights or the word vectors are not available.
    """

    graph: Tensor
    words: Tensor
    has_label_features = True

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: str = "resnet101.tv_in1k",
        pretrained: str | None = TIMM,
        words: WordVectorsCallable = ClipWords,
        dim: int | None = None,
        attention_width: int = 1024,
        steps: int = 3,
    ) -> None:
        super().__init__()
        self.trunk = PartlyFrozenResNet(backbone, pretrained)
        vectors = words(class_names).vectors
        self.register_buffer("words", vectors.clone())
        self.register_buffer("graph", torch.zeros(len(vectors), len(vectors)))  # computed by the hooks
        self.narrow: nn.Module = nn.Identity()
        if dim is not None:
            self.narrow = nn.Sequential(nn.Conv2d(self.trunk.width, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.dim = dim if dim is not None else self.trunk.width
        self.decouple = SemanticDecoupling(self.dim, vectors.shape[1], attention_width)
        self.spread = GatedGraph(self.dim, steps)
        self.merge = nn.Linear(2 * self.dim, self.dim)
        bound = self.dim**-0.5
        self.weight = nn.Parameter(torch.empty(len(vectors), self.dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(vectors)).uniform_(-bound, bound))
        self.hooks = LabelGraph()

    @property
    def frozen_weights(self) -> str:
        """Fingerprint of the frozen stages."""
        return self.trunk.fingerprint

    def features(self, images: Tensor) -> Tensor:
        """Returns the map of the third stage, without gradients; see :meth:`PartlyFrozenResNet.features`."""
        return self.trunk.features(images)

    def forward(self, features: Tensor, text: Any = None, *, attention: bool = False) -> NetworkOutput:
        """Computes the logits; see :class:`Network`. The label features are those before the graph network."""
        found = self.narrow(self.trunk(features))
        own, weights = self.decouple(found, self.words)
        maps = weights.unflatten(-1, found.shape[2:]) if attention else None
        return NetworkOutput(self.classify(own), attention=maps, label_features=own, notes=self.notes(found, weights))

    def notes(self, found: Tensor, weights: Tensor) -> Tensor | None:
        """Returns the ``notes`` of the output for a map ``(B, D, h, w)`` and attention ``(B, C, h * w)``, or None."""
        return None

    def classify(self, own: Tensor) -> Tensor:
        """Computes logits ``(B, C)`` from label features ``(B, C, dim)`` with the graph network and the classifiers."""
        merged: Tensor = self.merge(torch.cat([self.spread(own, self.graph), own], -1)).tanh()
        return (merged * self.weight).sum(-1) + self.bias

    def mean_feature_logits(self, label_features: Tensor, text: Any = None) -> Tensor:
        """See :class:`Network`."""
        return self.classify(label_features.mean(1, keepdim=True).expand_as(label_features))
