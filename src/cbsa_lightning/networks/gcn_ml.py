"""GCN-ML: graph convolutions turn word vectors into classifiers (Chen et al., CVPR 2019)."""

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
    """Dot products of the max-pooled map with classifiers that two graph convolutions compute from word vectors.

    Args:
        num_features: D, channels of the map.
        num_classes: C.
        vectors: ``(C, d)`` word vectors.
        hidden: Width between the two convolutions.
    """

    words: Tensor
    graph: Tensor

    def __init__(self, num_features: int, num_classes: int, vectors: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("words", vectors.clone())
        self.register_buffer("graph", torch.eye(num_classes))  # set by the hooks
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
    """An ImageNet ResNet, all of it trained, with :class:`GraphClassifiers`.

    Source: repository megvii-research/ML-GCN. Differences: the graph is computed from the known positives of the run,
    not read from a file; a class without known positives has no neighbors, where the original divides by zero; and
    unknown labels have no loss (``MeanBinaryCrossEntropy``), as in the comparisons for partial labels.

    Args:
        class_names: The C class names, for word vectors.
        backbone: Name of a timm model, with the tag of its weights.
        pretrained: "timm" for the weights of the tag, a file of weights, or "random".
        words: Creates the word vectors: ``GloVe`` with a file, or ``ClipWords``.
        hidden: Width between the graph convolutions.
        threshold: Conditional co-occurrence at or above which a class is a neighbor of another.
        neighbor_share: Total weight of the neighbors of a class; the class itself has weight 1.
        trunk_lr_scale: Factor of the learning rate for the ResNet.

    Raises:
        ConfigError: timm has no such model, or a setting is outside of its bounds.
        WeightsError: Weights or word vectors are not available.
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
        """Returns the ResNet in a separate group with its own learning-rate factor."""
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
    """Returns the normalized adjacency ``(C, C)`` of conditional co-occurrence ``(C, C)``.

    Pairs at or above the threshold are 1, others 0. Each column is scaled to a sum of ``neighbor_share``, the
    identity is added, and the transpose is divided by the square roots of both degrees.
    """
    joined = (cooccurrence >= threshold).to(cooccurrence.dtype).fill_diagonal_(0)
    joined = joined * neighbor_share / (joined.sum(0, keepdim=True) + 1e-6) + torch.eye(len(joined))
    degree = joined.sum(1).rsqrt()
    return degree[:, None] * joined.T * degree
