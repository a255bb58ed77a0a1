"""Element-wise losses over images and classes, in float32; unknown entries contribute exactly 0.

The functions do not reduce over images. The training loop sums every loss term and divides it by the batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.arguments import check_number
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.networks.processes import total


def asymmetric_loss(
    logits: Tensor, targets: Tensor, gamma_pos: float = 0.0, gamma_neg: float = 4.0, clip: float = 0.05
) -> Tensor:
    """Computes the element-wise asymmetric loss (ASL; Eq. 7-8 of the paper, with the margin of CAP's protocol).

    With ``p = sigmoid(logit)`` and the shifted probability ``p_m = max(p - clip, 0)``, the loss is:

    - positive entries: ``(1 - p) ** gamma_pos * -log(p)``
    - negative entries: ``p_m ** gamma_neg * -log(1 - p_m)``

    The gradient treats the focal weights (the powers) as constants. With a margin, the gradient of a badly
    misclassified negative is about ``(1 - p) / clip``. It vanishes as ``p`` approaches 1, so ASL discounts labels that
    are probably wrong. If both gammas and the margin are 0, the loss is the binary cross-entropy on logits.

    Args:
        logits: ``(B, C)``, any floating type; the loss is computed in float32 even under autocast.
        targets: ``(B, C)``, integer or bool: 1 positive, 0 negative, -1 unknown.
        gamma_pos: focusing power of positives, >= 0.
        gamma_neg: focusing power of negatives, >= 0.
        clip: probability margin of negatives, in [0, 1).

    Returns:
        ``(B, C)`` float32, 0 for unknown entries.

    Raises:
        ConfigError: If a gamma is negative or the margin is outside [0, 1).
        DataError: If the shapes differ or the targets are floating-point; use :func:`soft_target_loss` for soft
            targets.
    """
    _check_asymmetric(gamma_pos, gamma_neg, clip)
    _check_entries(logits, targets)
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.float()
        fixed = x.detach()
        positive = -F.logsigmoid(x)
        if gamma_pos > 0:
            positive = positive * torch.sigmoid(-fixed) ** gamma_pos
        # sigmoid(-x) keeps 1 - p and its gradient at full precision even if 1 - sigmoid(x) is already 0. With a margin,
        # the argument of the logarithm is at least `clip`; without one, the loss is computed in log-space.
        negative = -torch.log((torch.sigmoid(-x) + clip).clamp(max=1.0)) if clip > 0 else -F.logsigmoid(-x)
        if gamma_neg > 0:
            negative = negative * (torch.sigmoid(fixed) - clip).clamp(min=0.0) ** gamma_neg
        return _choose(positive, negative, targets)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the element-wise binary cross-entropy on logits in float32; it is 0 for unknown entries.

    Args:
        logits: ``(B, C)``, any floating type.
        targets: ``(B, C)``, integer or bool: 1 positive, 0 negative, -1 unknown.

    Returns:
        ``(B, C)`` float32.

    Raises:
        DataError: If the shapes differ or the targets are floating-point.
    """
    _check_entries(logits, targets)
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.float()
        return _choose(-F.logsigmoid(x), -F.logsigmoid(-x), targets)


def soft_target_loss(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Applies an element-wise loss to soft targets: ``t * loss(positive) + (1 - t) * loss(negative)``.

    Args:
        loss: element-wise function of logits ``(B, C)`` and integer targets ``(B, C)``.
        logits: ``(B, C)``, any floating type.
        targets: ``(B, C)``, floating-point: the probability t of the label in [0, 1], or -1 if it is unknown.

    Returns:
        ``(B, C)``, 0 for unknown entries; equal to ``loss`` for targets of 0, 1 and -1.
    """
    known = targets >= 0
    yes, no = (torch.where(known, answer, -1).to(torch.int8) for answer in (1, 0))
    positive, negative = loss(logits, yes), loss(logits, no)
    share = targets.float().clamp(min=0)
    return share * positive + (1 - share) * negative


def context_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of the context head (Eq. 11), one value per image.

    Args:
        logits: ``(B, K)``, any floating type; computed in float32.
        targets: ``(B,)`` int64 context ids with -1 for images without a context, or ``(B, K)`` floating-point
            distributions over contexts with rows of zeros for such images.

    Returns:
        ``(B,)`` float32, 0 for images without a context.

    Raises:
        DataError: If the shapes do not fit, or ``(B, K)`` targets are integers.
    """
    batch = logits.shape[0] if logits.ndim == 2 else -1
    hard = targets.ndim == 1 and not targets.is_floating_point() and targets.shape[0] == batch
    soft = targets.shape == logits.shape and targets.is_floating_point()
    if batch < 0 or not (hard or soft):
        raise DataError(
            f"context loss: logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)} of "
            f"{targets.dtype}; targets are (B,) integer ids with -1 for none, or (B, K) floating distributions"
        )
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.float()
        if hard:
            return F.cross_entropy(x, targets.long(), ignore_index=-1, reduction="none")
        return F.cross_entropy(x, targets.float(), reduction="none")


class ElementwiseLoss(nn.Module):
    """Base class of the losses that a configuration can select; ``loss(logits, targets)`` is ``(B, C)`` float32."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Computes the loss of every entry; ``targets`` are 1, 0 and -1 (unknown, loss 0)."""
        raise NotImplementedError


class AsymmetricLoss(ElementwiseLoss):
    """Module form of :func:`asymmetric_loss`.

    Args:
        gamma_pos: focusing power of positives, >= 0.
        gamma_neg: focusing power of negatives, >= 0.
        clip: probability margin of negatives, in [0, 1).

    Raises:
        ConfigError: If a gamma is negative or the margin is outside [0, 1).
    """

    def __init__(self, gamma_pos: float = 0.0, gamma_neg: float = 4.0, clip: float = 0.05) -> None:
        _check_asymmetric(gamma_pos, gamma_neg, clip)
        super().__init__()
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.clip = clip

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See :func:`asymmetric_loss`."""
        return asymmetric_loss(logits, targets, self.gamma_pos, self.gamma_neg, self.clip)

    def extra_repr(self) -> str:
        """Returns the settings, for ``print(module)``."""
        return f"gamma_pos={self.gamma_pos}, gamma_neg={self.gamma_neg}, clip={self.clip}"


class BinaryCrossEntropy(ElementwiseLoss):
    """Module form of :func:`binary_cross_entropy`."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See :func:`binary_cross_entropy`."""
        return binary_cross_entropy(logits, targets)


class MeanBinaryCrossEntropy(ElementwiseLoss):
    """Binary cross-entropy, scaled so that the loss of a step is the mean over the known entries of the batch.

    The training loop sums over entries and divides by the number of images. The systems for partial labels use the mean
    over known entries instead, and the weights of their other loss terms are chosen for this scale.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See :class:`ElementwiseLoss`."""
        known = targets >= 0
        images, entries = total(torch.stack([torch.ones_like(known[:, 0]).sum(), known.sum()])).float()
        scale: Tensor = images / entries.clamp(min=1)
        each = binary_cross_entropy(logits, targets)
        return each * scale.to(each.dtype)


def _choose(positive: Tensor, negative: Tensor, targets: Tensor) -> Tensor:
    """Selects the loss of each entry by its target; unknown entries get a constant 0 with gradient 0."""
    known = torch.where(targets == 1, positive, negative)
    return torch.where(targets >= 0, known, torch.zeros_like(known))


def _check_asymmetric(gamma_pos: float, gamma_neg: float, clip: float) -> None:
    check_number("asymmetric loss: gamma_pos", gamma_pos, 0)
    check_number("asymmetric loss: gamma_neg", gamma_neg, 0)
    check_number("asymmetric loss: clip", clip, 0, 1)
    if clip == 1:
        raise ConfigError(f"asymmetric loss: clip is a probability margin in [0, 1), got {clip}")


def _check_entries(logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:
        raise DataError(f"loss: logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
    if targets.is_floating_point():
        raise DataError(f"loss: targets must be the integers 1, 0 and -1 (unknown), got {targets.dtype}")
