"""GCN-ML: classifiers computed from word vectors with graph convolutions (Chen et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cbsa_lightning.arguments import check_number
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.gated_graph import conditional_cooccurrence
from cbsa_lightning.networks.graph_convolution import graph_convolution
from cbsa_lightning.networks.hooks import TrainingHooks
from cbsa_lightning.networks.imagenet_weights import TIMM
from cbsa_lightning.networks.partly_frozen import IMAGENET_MEAN, IMAGENET_STD
from cbsa_lightning.networks.prompted import parameter_groups
from cbsa_lightning.networks.resnet import Head, ImageNetNetwork
from cbsa_lightning.networks.word_vectors import ClipWords, WordVectorsCallable


class GraphClassifiers(Head):
    """Linear classifiers of the max-pooled map, whose weights two graph convolutions compute from word vectors.

    Args:
        num_features: D, the number of channels of the map.
        num_classes: C.
        vectors: Word vectors ``(C, d)``.
        hidden: Width between the two convolutions.
    """

    words: Tensor
    graph: Tensor

    def __init__(self, num_features: int, num_classes: int, vectors: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("words", vectors.clone())
        self.register_buffer("graph", torch.eye(num_classes))  # computed by the hooks
        self.first = graph_convolution(vectors.shape[1], hidden)
        self.second = graph_convolution(hidden, num_features)

    def classifiers(self) -> Tensor:
        """Returns the weights ``(C, D)`` of the classes."""
        hidden = F.leaky_relu(self.graph @ self.first(self.words), 0.2)
        return self.graph.to(hidden.dtype) @ cast(Tensor, self.second(hidden))

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """See :class:`Head`; there are no attention maps."""
        return NetworkOutput(features.amax((2, 3)) @ self.classifiers().T)


class GCNML(ImageNetNetwork):
    """ImageNet ResNet with :class:`GraphClassifiers`, all layers of which are trained.

    Source: repository megvii-research/ML-GCN. Differences: The graph is computed from the known positives of the run
    instead of read from a file. A class without known positives has no neighbors, whereas the original divides by zero.
    Unknown labels do not contribute to the loss (``MeanBinaryCrossEntropy``), as in the comparisons for partial labels.

    Args:
        class_names: The C class names, which determine the word vectors.
        backbone: Name of a timm model, including the tag of its weights.
        pretrained: "timm" for the weights of the tag, a weights file, or "random".
        words: Class that creates the word vectors: ``GloVe`` with a file, or ``ClipWords``.
        hidden: Width between the graph convolutions.
        threshold: Minimum conditional co-occurrence of neighboring classes.
        neighbor_share: Total weight of the neighbors of a class; the class itself has weight 1.
        trunk_lr_scale: Factor of the learning rate for the ResNet.

    Raises:
        ConfigError: If timm does not have the model, or a setting is out of range.
        WeightsError: If the weights or the word vectors are not available.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: str = "resnet101.tv_in1k",
        pretrained: str | None = TIMM,
        words: WordVectorsCallable = ClipWords,
        hidden: int = 1024,
        threshold: float = 0.4,
        neighbor_share: float = 0.25,
        trunk_lr_scale: float = 0.1,
    ) -> None:
        check_number("threshold", threshold, 0, 1)
        check_number("neighbor_share", neighbor_share, 0)
        head = partial(GraphClassifiers, vectors=words(class_names).vectors, hidden=hidden)
        super().__init__(class_names, backbone, pretrained, head, IMAGENET_MEAN, IMAGENET_STD)
        self.trunk_lr_scale = trunk_lr_scale
        self.hooks = NeighborGraph(threshold, neighbor_share)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns parameter groups. The ResNet has its own group and learning-rate factor."""
        return parameter_groups(self, self.trunk, self.trunk_lr_scale)


class NeighborGraph(TrainingHooks):
    """Computes the graph of :class:`GraphClassifiers` from the training labels.

    Args:
        threshold: See :class:`GCNML`.
        neighbor_share: See :class:`GCNML`.
    """

    def __init__(self, threshold: float, neighbor_share: float) -> None:
        super().__init__()
        self.threshold, self.neighbor_share = threshold, neighbor_share

    def before_training(self, network: Any, labels: Tensor) -> None:
        """See :class:`TrainingHooks`."""
        graph = neighbor_graph(conditional_cooccurrence(labels), self.threshold, self.neighbor_share)
        network.head.graph.copy_(graph)


def neighbor_graph(cooccurrence: Tensor, threshold: float, neighbor_share: float) -> Tensor:
    """Returns the normalized adjacency matrix ``(C, C)`` of the conditional co-occurrence ``(C, C)``.

    Entries at or above the threshold are set to 1, the others to 0. Each column is scaled so that its sum is
    ``neighbor_share``, and the identity is added. The transpose of the result is divided by the square roots of both
    degrees.
    """
    joined = (cooccurrence >= threshold).to(cooccurrence.dtype).fill_diagonal_(0)
    joined = joined * neighbor_share / (joined.sum(0, keepdim=True) + 1e-6) + torch.eye(len(joined))
    degree = joined.sum(1).rsqrt()
    return degree[:, None] * joined.T * degree
