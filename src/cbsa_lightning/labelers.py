"""Labelers: weak-view scores of a whole epoch in, pseudo-labels in {1, 0, -1 ignored} out.

Scores are probabilities, one row an image and one column a class. They are compared in float32: half
precision saturates and ties at its ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cbsa_lightning.errors import ConfigError, DataError, listed


class PseudoLabels(NamedTuple):
    """What a labeler returns.

    Attributes:
        labels: ``(n, C)`` int8: 1 positive, 0 negative, -1 ignored.
        tau_pos: ``(C,)`` float32, scores at or above it are positive; NaN where no class threshold exists.
        tau_neg: ``(C,)`` float32, scores at or below it are negative; NaN where no class threshold exists.
    """

    labels: Tensor
    tau_pos: Tensor
    tau_neg: Tensor


def positive_rates(labels: Tensor) -> Tensor:
    """Share of positives of each class among its known entries: the gamma_k of CAT.

    Args:
        labels: ``(m, C)`` in {1, 0, -1 unknown}, any integer type.

    Returns:
        ``(C,)`` float64 on the CPU; 0 for a class of which no entry is known, so that it gets no
        pseudo-positives.
    """
    if labels.ndim != 2:
        raise DataError(f"positive rates: labels must be (m, C), got {tuple(labels.shape)}")
    positives = (labels == 1).sum(dim=0).cpu().double()
    known = (labels >= 0).sum(dim=0).cpu().double()
    return positives / known.clamp(min=1.0)


def class_thresholds(
    scores: Tensor, positive_rate: Tensor, eta_pos: float = 1.0, eta_neg: float = 0.998
) -> tuple[Tensor, Tensor]:
    """Class-wise thresholds (CAT): the quantiles at which pseudo-labels take the labelled set's proportions.

    Of n scores of class k with positive rate ``gamma``, ``r_pos = int(eta_pos * gamma * n)`` and
    ``r_neg = int(eta_neg * (1 - gamma) * n)``. ``tau_pos`` is the r_pos-th largest score, ``tau_neg`` the
    r_neg-th smallest. ``r_pos = 0`` gives ``tau_pos = +inf`` (no positives) and ``r_neg = 0`` gives
    ``tau_neg = -inf``. Always ``tau_neg <= tau_pos``.

    A rate is a count divided by a count, so the product may land a rounding error below a whole number
    (0.29 * 100 = 28.999...). The product is therefore raised by four rounding steps of the rate's own type
    before it is cut: pass float64 rates, as :func:`positive_rates` gives, to have the counts exact.

    Args:
        scores: ``(n, C)`` on any device; compared in float32.
        positive_rate: ``(C,)`` in [0, 1].
        eta_pos: share of the expected positives that are labelled, in [0, 1].
        eta_neg: share of the expected negatives that are labelled, in [0, 1].

    Returns:
        ``tau_pos (C,)`` and ``tau_neg (C,)``, float32 on the scores' device.

    Raises:
        DataError: for scores that are not finite, an empty score matrix, or rates that do not fit it.
        ConfigError: for an eta outside [0, 1].
    """
    _check_etas(eta_pos, eta_neg)
    values = _checked(scores)
    n, num_classes = values.shape
    if n == 0:
        raise DataError("class thresholds: there are no scores (n = 0), so there is no quantile to take")
    rate = _checked_rate(positive_rate, num_classes)
    slack = 4 * torch.finfo(positive_rate.dtype if positive_rate.is_floating_point() else torch.float64).eps
    r_pos = _whole(eta_pos * rate * n, slack).clamp(max=n)
    r_neg = torch.minimum(_whole(eta_neg * (1 - rate) * n, slack), n - r_pos)

    ascending = values.T.contiguous().sort(dim=1).values
    r_pos, r_neg = r_pos.to(values.device), r_neg.to(values.device)
    largest = ascending.gather(1, (n - r_pos).clamp(max=n - 1)[:, None])[:, 0]
    smallest = ascending.gather(1, (r_neg - 1).clamp(min=0)[:, None])[:, 0]
    return largest.masked_fill(r_pos == 0, torch.inf), smallest.masked_fill(r_neg == 0, -torch.inf)


def pseudo_labels(scores: Tensor, tau_pos: Tensor, tau_neg: Tensor) -> Tensor:
    """Pseudo-labels from class thresholds (Eq. 6).

    A score at or above ``tau_pos`` is positive, else one at or below ``tau_neg`` is negative, else the entry
    is ignored. So a score that meets both is positive, images that tie with a threshold are labelled alike
    (there can be more of them than the count behind the threshold), and a NaN threshold, one never set,
    labels nothing.

    Args:
        scores: ``(n, C)``.
        tau_pos: ``(C,)``.
        tau_neg: ``(C,)``.

    Returns:
        ``(n, C)`` int8 in {1, 0, -1}, on the scores' device.

    Raises:
        DataError: for scores that are not finite, or thresholds of another shape.
    """
    values = _checked(scores)
    expected = (values.shape[1],)
    if tau_pos.shape != expected or tau_neg.shape != expected:
        raise DataError(
            f"pseudo-labels: thresholds must be {expected} for scores {tuple(values.shape)}, "
            f"got {tuple(tau_pos.shape)} and {tuple(tau_neg.shape)}"
        )
    labels = torch.full_like(values, -1, dtype=torch.int8)
    labels[values <= tau_neg.to(values)] = 0
    labels[values >= tau_pos.to(values)] = 1
    return labels


class Labeler(ABC):
    """Turns the scores of the unlabelled set into pseudo-labels; a method's configuration chooses one."""

    @abstractmethod
    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """Labels every entry.

        Args:
            scores: ``(n, C)`` probabilities of the weak views.
            positive_rate: ``(C,)`` share of positives in the labelled set.
        """


@dataclass(frozen=True)
class ClassDistributionAware(Labeler):
    """CAT, the class-distribution-aware labeler of CAP and CBSA: :func:`class_thresholds`, then Eq. 6.

    Args:
        eta_pos: share of the expected positives that are labelled, in [0, 1].
        eta_neg: share of the expected negatives that are labelled, in [0, 1].
    """

    eta_pos: float = 1.0
    eta_neg: float = 0.998

    def __post_init__(self) -> None:
        _check_etas(self.eta_pos, self.eta_neg)

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`."""
        tau_pos, tau_neg = class_thresholds(scores, positive_rate, self.eta_pos, self.eta_neg)
        return PseudoLabels(pseudo_labels(scores, tau_pos, tau_neg), tau_pos, tau_neg)


@dataclass(frozen=True)
class LabelledOnly(Labeler):
    """Labels nothing: training goes on with the labelled images alone, for as many steps as with a labeler."""

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; every entry is ignored."""
        labels = torch.full(scores.shape, -1, dtype=torch.int8, device=scores.device)
        none = torch.full((scores.shape[1],), torch.nan, device=scores.device)
        return PseudoLabels(labels, none, none.clone())


@dataclass(frozen=True)
class TopK(Labeler):
    """The k classes with the highest scores of an image are positive, all others negative.

    Equal scores go to the class that comes first. The compared work takes k = 2 on VOC and NUS-WIDE, 3 on
    COCO.

    Args:
        k: number of positives an image, >= 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"top-k labeler: k must be at least 1, got {self.k}")

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _top(scores, self.k)


@dataclass(frozen=True)
class TopOne(Labeler):
    """The class with the highest score of an image (at a tie the first) is positive, all others negative."""

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _top(scores, 1)


@dataclass(frozen=True)
class InstanceAware(Labeler):
    """IAT: one cut for every class, judged image by image; by default every entry is labelled.

    The paper gives no value for the cut; 0.5 is this library's reading.

    Args:
        pos: scores at or above it are positive, in [0, 1].
        neg: other scores at or below it are negative, in [0, 1], at most ``pos``.
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
    """FixMatch-style pair of confidence thresholds, the same for every class; what lies between is ignored.

    Args:
        tau_pos: scores at or above it are positive, in [0, 1].
        tau_neg: other scores at or below it are negative, in [0, 1], at most ``tau_pos``.
    """

    tau_pos: float = 0.95
    tau_neg: float = 0.05

    def __post_init__(self) -> None:
        _check_cuts(self.tau_pos, self.tau_neg)

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`; the rates are not used."""
        return _constant(scores, self.tau_pos, self.tau_neg)


def _constant(scores: Tensor, pos: float, neg: float) -> PseudoLabels:
    tau_pos = torch.full((scores.shape[-1],), pos, device=scores.device)
    tau_neg = torch.full_like(tau_pos, neg)
    return PseudoLabels(pseudo_labels(scores, tau_pos, tau_neg), tau_pos, tau_neg)


def _top(scores: Tensor, k: int) -> PseudoLabels:
    values = _checked(scores)
    if k > values.shape[1]:
        raise ConfigError(f"top-k labeler: k = {k}, but there are only {values.shape[1]} classes")
    # A stable sort, because topk promises no order among equal scores.
    best = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    labels = torch.zeros_like(values, dtype=torch.int8).scatter_(1, best, 1)
    none = torch.full((values.shape[1],), torch.nan, device=values.device)
    return PseudoLabels(labels, none, none.clone())


def _whole(expected: Tensor, slack: float) -> Tensor:
    """The expected count cut to a whole number, forgiving rounding errors of relative size ``slack``."""
    return (expected * (1 + slack)).floor().long()


def _checked(scores: Tensor) -> Tensor:
    if scores.ndim != 2:
        raise DataError(f"scores must be (images, classes), got {tuple(scores.shape)}")
    values = scores.detach().float()
    finite = torch.isfinite(values)
    if not finite.all():
        per_class = (~finite).sum(dim=0).cpu()
        classes = [f"{k} ({int(per_class[k])})" for k in per_class.nonzero()[:, 0].tolist()]
        raise DataError(
            f"{int(per_class.sum())} of {values.numel()} scores are not finite, in class {listed(classes)}; "
            "training has diverged: lower the learning rate, or compute the scores in float32"
        )
    return values


def _checked_rate(positive_rate: Tensor, num_classes: int) -> Tensor:
    rate = positive_rate.detach().cpu().double()
    if rate.shape != (num_classes,):
        raise DataError(f"class thresholds: {num_classes} classes need as many rates, got {tuple(rate.shape)}")
    wrong = ~((rate >= 0) & (rate <= 1))
    if wrong.any():
        found = [f"class {k}: {float(rate[k])}" for k in wrong.nonzero()[:, 0].tolist()]
        raise DataError(f"class thresholds: positive rates must lie in [0, 1]; {listed(found)}")
    return rate


def _check_etas(eta_pos: float, eta_neg: float) -> None:
    if not (0 <= eta_pos <= 1 and 0 <= eta_neg <= 1):
        raise ConfigError(f"class thresholds: eta_pos and eta_neg are shares in [0, 1], got {eta_pos} and {eta_neg}")


def _check_cuts(pos: float, neg: float) -> None:
    if not 0 <= neg <= pos <= 1:
        raise ConfigError(f"thresholds must satisfy 0 <= negative <= positive <= 1, got {neg} and {pos}")
