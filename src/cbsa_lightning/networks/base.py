"""Interface between the training loop and a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class NetworkOutput(NamedTuple):
    """Output of a network for a batch.

    Attributes:
        logits: ``(B, C)``; the sigmoid of an entry is the probability of that label.
        context_logits: ``(B, K)`` over the contexts, or None without a context head.
        attention: ``(B, C, h, w)``, attention of each label over the grid, which sums to 1, or None.
        label_features: ``(B, C, d)``, one image feature for each label, or None if all labels share one.
    """

    logits: Tensor
    context_logits: Tensor | None = None
    attention: Tensor | None = None
    label_features: Tensor | None = None


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

    A forward pass has three parts, so that each runs only when its inputs change: ``features`` (frozen, never in the
    graph), ``encode_text`` (changes with each optimizer step, shared by all images) and ``forward``.
    """

    num_contexts: int = 0
    has_label_features: bool = False
    context_tensors: tuple[str, ...] = ()  # names of the parameters whose first dimension is the contexts

    @property
    def frozen_weights(self) -> str | None:
        """Fingerprint of all weights that :meth:`features` depends on; None if they are trained or there are none."""
        return None

    def class_tensors(self) -> set[str] | None:
        """Names of the parameters and buffers whose first dimension is the classes; None if unknown.

        A new run with other classes copies their rows by class name. If they are unknown, it needs the same classes in
        the same order.
        """
        return None

    def features(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` uint8 images to the input of ``forward``, with the frozen part of the image tower."""
        raise NotImplementedError

    def describer(self) -> Callable[[Tensor], Description]:
        """Returns a function that maps features to a :class:`Description`. Use it before training starts.

        By default, this is the mean of the features over the places of the grid.
        """

        def describe(features: Tensor) -> Description:
            return Description([mean_over_places(features)], [])

        return describe

    def encode_text(self) -> Any:
        """Returns the class features, which all images of a step share; None for a network without a text tower."""
        return None

    def forward(self, features: Tensor, text: Any = None, *, attention: bool = False) -> NetworkOutput:
        """Runs the trainable part.

        Args:
            features: Output of :meth:`features`.
            text: Output of :meth:`encode_text`; None computes it here.
            attention: Whether to return the attention maps too.
        """
        raise NotImplementedError

    def mean_feature_logits(self, label_features: Tensor, text: Any = None) -> Tensor:
        """Returns the logits ``(B, C)`` if every label uses the mean of an image's ``label_features (B, C, d)``.

        Only networks with label features implement it.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns trainable parameters as ``{"params": [...], "lr_scale": float}``; the scale multiplies the rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]


def mean_over_places(features: Tensor) -> Tensor:
    """Returns float32 ``(B, D)`` from a map ``(B, D, h, w)``, all tokens ``(B, L, D)``, or ``(B, D)`` itself."""
    if features.ndim == 4:
        return features.float().mean((2, 3))
    return features.float().mean(1) if features.ndim == 3 else features.float()
