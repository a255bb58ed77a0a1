"""What the training loop asks of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class NetworkOutput(NamedTuple):
    """What a network says about a batch.

    Attributes:
        logits: ``(B, C)``; the sigmoid of an entry is the probability of that label.
        context_logits: ``(B, K)`` over the contexts, or None without a context head.
        attention: ``(B, C, h, w)``, where each label looked (rows sum to 1 over the grid), or None.
        label_features: ``(B, C, d)``, one image feature for each label, or None where all labels share one.
        notes: ``(B, C)`` int64, what the network's training hooks need to know of each label beside its feature, or
            None.
    """

    logits: Tensor
    context_logits: Tensor | None = None
    attention: Tensor | None = None
    label_features: Tensor | None = None
    notes: Tensor | None = None


class Description(NamedTuple):
    """What is known of a batch before training; see :class:`cbsa_lightning.method.labelers.Evidence`.

    Attributes:
        descriptors: each ``(B, D)``, float32.
        scores: each ``(B, C)``, float32, such as zero-shot scores.
    """

    descriptors: list[Tensor]
    scores: list[Tensor]


class Network(nn.Module):
    """Base of the networks that the training loop can train.

    A forward pass has three parts, so that each is paid for only when it changes: ``features`` (frozen, never
    in the graph), ``encode_text`` (changes with each optimizer step, shared by all images) and ``forward``.

    Attributes:
        hooks: A :class:`~cbsa_lightning.networks.hooks.TrainingHooks` where training needs more than logits and labels,
            else None.
    """

    hooks: Any

    num_contexts: int = 0
    has_label_features: bool = False
    context_tensors: tuple[str, ...] = ()  # names of the parameters whose first dimension is the contexts

    def __init__(self) -> None:
        super().__init__()
        self.hooks = None

    @property
    def frozen_weights(self) -> str | None:
        """Fingerprint of all weights that :meth:`features` depends on; None where they are trained or there is none."""
        return None

    def class_tensors(self) -> set[str] | None:
        """Names of the parameters and buffers whose first dimension is the classes; None where that is not known.

        A new run with other classes takes over their rows by class name; where they are not known, it needs the same
        classes in the same order.
        """
        return None

    def features(self, images: Tensor) -> Tensor:
        """Frozen part of the image tower: ``(B, 3, H, W)`` uint8 images to whatever ``forward`` takes."""
        raise NotImplementedError

    def describer(self) -> Callable[[Tensor], Description]:
        """Gives a function from features to what is known of the images before training, to be used right away.

        Here the mean of the features over the places of the grid.
        """

        def describe(features: Tensor) -> Description:
            return Description([mean_over_places(features)], [])

        return describe

    def encode_text(self) -> Any:
        """Features of the classes, shared by all images of a step; None for a network without a text tower."""
        return None

    def forward(self, features: Tensor, text: Any = None, *, attention: bool = False) -> NetworkOutput:
        """Trainable part.

        Args:
            features: What :meth:`features` gave.
            text: What :meth:`encode_text` gave; computed here when None.
            attention: Whether to give the attention maps too.
        """
        raise NotImplementedError

    def mean_feature_logits(self, label_features: Tensor, text: Any = None) -> Tensor:
        """Logits ``(B, C)`` when every label gets the mean of an image's ``label_features (B, C, d)``.

        Only networks whose output has label features implement it.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters as ``{"params": [...], "lr_scale": float}``, the scale times the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]


def mean_over_places(features: Tensor) -> Tensor:
    """``(B, D)`` float32 of a map ``(B, D, h, w)``, of all tokens ``(B, L, D)``, or of ``(B, D)`` itself."""
    if features.ndim == 4:
        return features.float().mean((2, 3))
    return features.float().mean(1) if features.ndim == 3 else features.float()
