"""Labelers, which convert the weak-view scores of a whole epoch to pseudo-labels in {1, 0, -1 ignored}.

Scores are probabilities, with one row per image and one column per class. They are compared in float32, since half
precision saturates near 0 and 1 and therefore produces ties.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cbsa_lightning.arguments import check_number
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.thresholds import check_etas, check_scores, row_strips
from cbsa_lightning.method.thresholds import class_thresholds as class_thresholds  # part of this module's interface


class PseudoLabels(NamedTuple):
    """Output of a labeler.

    Attributes:
        labels: ``(n, C)`` int8: 1 positive, 0 negative, -1 ignored.
        tau_pos: ``(C,)`` float32, scores at or above it are positive; NaN if there is no class threshold.
        tau_neg: ``(C,)`` float32, scores at or below it are negative; NaN if there is no class threshold.
    """

    labels: Tensor
    tau_pos: Tensor
    tau_neg: Tensor


def positive_rates(labels: Tensor) -> Tensor:
    """Returns the fraction of positives among the known entries of each class, called gamma_k in CAT.

    Args:
        labels: ``(m, C)`` in {1, 0, -1 unknown}, any integer type.

    Returns:
        ``(C,)`` float64 on the CPU; 0 for a class without a known entry, so that it gets no pseudo-positives.
    """
    if labels.ndim != 2:
        raise DataError(f"positive rates: labels must be (m, C), got {tuple(labels.shape)}")
    positives = (labels == 1).sum(dim=0).cpu().double()
    known = (labels >= 0).sum(dim=0).cpu().double()
    return positives / known.clamp(min=1.0)


def pseudo_labels(scores: Tensor, tau_pos: Tensor, tau_neg: Tensor) -> Tensor:
    """Computes pseudo-labels from class thresholds (Eq. 6).

    A score at or above ``tau_pos`` is positive. Otherwise, a score at or below ``tau_neg`` is negative. All other
    entries are ignored. Images with equal scores get the same label, so ties can make the number of labels exceed the
    count that a threshold was computed for. A NaN threshold does not assign any labels.

    Args:
        scores: ``(n, C)``.
        tau_pos: ``(C,)``.
        tau_neg: ``(C,)``.

    Returns:
        ``(n, C)`` int8 in {1, 0, -1}, on the scores' device.

    Raises:
        DataError: If a score is not finite, or the thresholds have the wrong shape.
    """
    check_scores(scores)
    expected = (scores.shape[1],)
    if tau_pos.shape != expected or tau_neg.shape != expected:
        raise DataError(
            f"pseudo-labels: thresholds must be {expected} for scores {tuple(scores.shape)}, "
            f"got {tuple(tau_pos.shape)} and {tuple(tau_neg.shape)}"
        )
    tau_pos, tau_neg = (tau.to(scores.device, torch.float32) for tau in (tau_pos, tau_neg))
    labels = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    for rows, strip in row_strips(scores):
        positive = strip >= tau_pos
        ignored = ~(positive | (strip <= tau_neg))
        labels[rows] = positive.to(torch.int8) - ignored.to(torch.int8)
    return labels


class Labeler(ABC):
    """Base class of labelers that compute pseudo-labels from the scores of the images in each epoch.

    The scores cover unlabeled and partly labeled images; known labels are passed as scores of 1 and 0.
    """

    @abstractmethod
    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """Labels every entry.

        Args:
            scores: ``(n, C)`` probabilities of the weak views.
            positive_rate: ``(C,)`` fraction of positives among the known entries of the labeled images.
        """


class Evidence(NamedTuple):
    """Inputs of an :class:`EvidenceLabeler` for N training images, of which m are labeled.

    Attributes:
        descriptors: frozen features of the images, each ``(N, D)``; D may differ.
        scores: scores computed without labels, such as zero-shot scores, each ``(N, C)``.
        labeled: ``(m,)`` int64, indices of the labeled images.
        labels: ``(m, C)`` in {1, 0, -1 unknown}, of the labeled images.
    """

    descriptors: list[Tensor]
    scores: list[Tensor]
    labeled: Tensor
    labels: Tensor


class EvidenceLabeler(ABC):
    """Base class of labelers that label the unlabeled images once before training.

    They use frozen features and the labeled images.

    Unknown entries of partly labeled images are ignored, except by a
    :class:`~cbsa_lightning.method.stacking.StackLabeler`, which labels them with its out-of-fold probabilities.
    """

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Tensor:
        """Labels every entry.

        Returns:
            ``(N - m, C)`` float32, for the unlabeled images in their order: the probability of the label, used as a
            soft target, or -1 if the entry is ignored.
        """


def rounded(targets: Tensor) -> Tensor:
    """Rounds soft targets in [0, 1] or -1 (ignored) to int8 labels in {1, 0, -1}; 0.5 is rounded to 1."""
    return torch.where(targets < 0, -1, (targets >= 0.5).to(torch.int8)).to(torch.int8)


@dataclass(frozen=True)
class ClassDistributionAware(Labeler):
    """CAT, the class-distribution-aware labeler of CAP and CBSA.

    It computes :func:`class_thresholds` and applies Eq. 6.

    Args:
        eta_pos: fraction of the expected positives that are labeled, in [0, 1].
        eta_neg: fraction of the expected negatives that are labeled, in [0, 1].
    """

    eta_pos: float = 1.0
    eta_neg: float = 0.998

    def __post_init__(self) -> None:
        check_etas(self.eta_pos, self.eta_neg)

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`."""
        tau_pos, tau_neg = class_thresholds(scores, positive_rate, self.eta_pos, self.eta_neg)
        return PseudoLabels(pseudo_labels(scores, tau_pos, tau_neg), tau_pos, tau_neg)


@dataclass(frozen=True)
class LabeledOnly(Labeler):
    """Ignores all entries. Training continues on labeled images only, for as many steps as with pseudo-labels."""

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; every entry is ignored."""
        labels = torch.full(scores.shape, -1, dtype=torch.int8, device=scores.device)
        none = torch.full((scores.shape[1],), torch.nan, device=scores.device).float()
        return PseudoLabels(labels, none, none.clone())


@dataclass(frozen=True)
class TopK(Labeler):
    """Labels the k classes with the highest scores in each image as positive, and all others as negative.

    If scores are equal, the class with the lowest index is chosen. The compared work uses k = 2 on VOC and NUS-WIDE,
    and k = 3 on COCO.

    Args:
        k: number of positives per image, >= 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_number("TopK: k", self.k, 1, whole=True)

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _top(scores, self.k)


@dataclass(frozen=True)
class TopOne(Labeler):
    """Labels the class with the highest score in each image as positive, and all others as negative.

    If scores are equal, the class with the lowest index is chosen.
    """

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _top(scores, 1)


@dataclass(frozen=True)
class InstanceAware(Labeler):
    """IAT, which applies one threshold to all classes. By default, every entry is labeled.

    The paper does not specify the threshold; this library uses 0.5.

    Args:
        pos: scores at or above this value are positive, in [0, 1].
        neg: other scores at or below this value are negative, in [0, 1], at most ``pos``.
    """

    pos: float = 0.5
    neg: float = 0.5

    def __post_init__(self) -> None:
        _check_cuts(self.pos, self.neg)

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _constant(scores, self.pos, self.neg)


@dataclass(frozen=True)
class Fixed(Labeler):
    """Applies one pair of confidence thresholds to all classes, as FixMatch does; scores in between are ignored.

    Args:
        tau_pos: scores at or above this value are positive, in [0, 1].
        tau_neg: other scores at or below this value are negative, in [0, 1], at most ``tau_pos``.
    """

    tau_pos: float = 0.95
    tau_neg: float = 0.05

    def __post_init__(self) -> None:
        _check_cuts(self.tau_pos, self.tau_neg)

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _constant(scores, self.tau_pos, self.tau_neg)


def _constant(scores: Tensor, pos: float, neg: float) -> PseudoLabels:
    tau_pos = torch.full((scores.shape[-1],), pos, device=scores.device).float()
    tau_neg = torch.full_like(tau_pos, neg)
    return PseudoLabels(pseudo_labels(scores, tau_pos, tau_neg), tau_pos, tau_neg)


def _top(scores: Tensor, k: int) -> PseudoLabels:
    check_scores(scores)
    num_classes = scores.shape[1]
    if k > num_classes:
        raise ConfigError(f"top-k labeler: k = {k}, but there are only {num_classes} classes")
    labels = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    for rows, strip in row_strips(scores):
        # topk does not define the order of equal scores, so this uses a stable sort.
        best = strip.sort(dim=1, descending=True, stable=True).indices[:, :k]
        labels[rows].scatter_(1, best, 1)
    none = torch.full((num_classes,), torch.nan, device=scores.device).float()
    return PseudoLabels(labels, none, none.clone())


def _check_cuts(pos: float, neg: float) -> None:
    for name, value in (("positive", pos), ("negative", neg)):
        check_number(f"the {name} threshold", value, 0, 1)
    if neg > pos:
        raise ConfigError(f"the negative threshold {neg} exceeds the positive threshold {pos}; choose a lower one.")
