"""Base class of the networks, and the types that they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class NetworkOutput(NamedTuple):
    """Output of a network for a batch.

    Attributes:
        logits: ``(B, C)``. The sigmoid of an entry is the probability of the label.
        context_logits: ``(B, K)``, one logit per context, or None if there is no context head.
        attention: ``(B, C, h, w)``, the attention of each label over the grid, which sums to 1, or None.
        label_features: ``(B, C, d)``, one image feature for each label, or None if all labels share one feature.
        notes: ``(B, C)`` int64, additional information about each label for the training hooks of the network, or
            None.
    """

    logits: Tensor
    context_logits: Tensor | None = None
    attention: Tensor | None = None
    label_features: Tensor | None = None
    notes: Tensor | None = None


class Description(NamedTuple):
    """Frozen features of a batch, computed before training; see :class:`cbsa_lightning.method.labelers.Evidence`.

    Attributes:
        descriptors: Tensors ``(B, D)``, float32.
        scores: Tensors ``(B, C)``, float32, such as zero-shot scores.
    """

    descriptors: list[Tensor]
    scores: list[Tensor]


class Network(nn.Module):
    """Base class of the networks that the training loop can train.

    A forward pass is split into three parts, so that each part runs only when its inputs change: ``features`` (frozen,
    without gradients), ``encode_text`` (changes in each optimizer step and is shared by all images), and ``forward``.

    Attributes:
        hooks: A :class:`~cbsa_lightning.networks.hooks.TrainingHooks` if training needs more than logits and labels,
            otherwise None.
    """

    hooks: Any

    num_contexts: int = 0
    has_label_features: bool = False
    context_tensors: tuple[str, ...] = ()  # parameters whose first dimension is the number of contexts

    def __init__(self) -> None:
        super().__init__()
        self.hooks = None

    @property
    def frozen_weights(self) -> str | None:
        """Fingerprint of the frozen weights that :meth:`features` depends on, or None if no weights are frozen."""
        return None

    def class_tensors(self) -> set[str] | None:
        """Names of the parameters and buffers whose first dimension is the number of classes, or None if unknown.

        If the classes of a new run differ, the rows of these tensors are copied by class name. If the names are
        unknown, a new run must have the same classes in the same order.
        """
        return None

    def features(self, images: Tensor) -> Tensor:
        """Applies the frozen part of the image tower to ``(B, 3, H, W)`` uint8 images; the input of ``forward``."""
        raise NotImplementedError

    def describer(self) -> Callable[[Tensor], Description]:
        """Returns a function that maps features to a :class:`Description`. Call it before training starts.

        By default, the description is the mean of the features over the places of the grid.
        """

        def describe(features: Tensor) -> Description:
            return Description([mean_over_places(features)], [])

        return describe

    def encode_text(self) -> Any:
        """Returns the class features, which all images of a step share, or None if there is no text tower."""
        return None

    def forward(self, features: Tensor, text: Any = None, *, attention: bool = False) -> NetworkOutput:
        """Runs the trainable part.

        Args:
            features: Output of :meth:`features`.
            text: Output of :meth:`encode_text`. If None, it is computed.
            attention: Whether to also return the attention maps.
        """
        raise NotImplementedError

    def mean_feature_logits(self, label_features: Tensor, text: Any = None) -> Tensor:
        """Returns logits ``(B, C)`` that use the mean of an image's ``label_features (B, C, d)`` for every label.

        Only networks with label features implement this method.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns groups of trainable parameters, ``{"params": [...], "lr_scale": factor of the learning rate}``."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]


def mean_over_places(features: Tensor) -> Tensor:
    """Returns the mean ``(B, D)`` in float32 of a map ``(B, D, h, w)`` or tokens ``(B, L, D)``; keeps ``(B, D)``."""
    if features.ndim == 4:
        return features.float().mean((2, 3))
    return features.float().mean(1) if features.ndim == 3 else features.float()
