"""What the training loop asks of a network."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class NetworkOutput(NamedTuple):
    """What a network says about a batch.

    Attributes:
        logits: ``(B, C)``; the sigmoid of an entry is the probability of that label.
        context_logits: ``(B, K)`` over the contexts, or None without a context head.
        attention: ``(B, C, h, w)``, where each label looked (rows sum to 1 over the grid), or None.
    """

    logits: Tensor
    context_logits: Tensor | None = None
    attention: Tensor | None = None


class Network(nn.Module):
    """Base of the networks that the training loop can train.

    A forward pass has three parts, so that each is paid for only when it changes: ``features`` (frozen, never
    in the graph), ``encode_text`` (changes with each optimiser step, shared by all images) and ``forward``.
    """

    num_contexts: int = 0

    @property
    def frozen_weights(self) -> str | None:
        """Fingerprint of all weights that :meth:`features` depends on; None where they are trained or there is none."""
        return None

    def features(self, images: Tensor) -> Tensor:
        """Frozen part of the image tower: ``(B, 3, H, W)`` uint8 images to whatever ``forward`` takes."""
        raise NotImplementedError

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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters as ``{"params": [...], "lr_scale": float}``, the scale times the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]
