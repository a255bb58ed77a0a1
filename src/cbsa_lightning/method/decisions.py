"""Decision thresholds, which convert calibrated probabilities to labels. An objective chooses one for each class.

Precision and recall at a threshold are expected values over the unlabeled images and are computed from their
probabilities. The 90 % intervals include the uncertainty of the calibration and the sampling noise of the labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from cbsa_lightning.arguments import check_number
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.calibration import Calibration
from cbsa_lightning.method.thresholds import positive_counts

Array = NDArray[np.floating]
DRAWS = 200
CANDIDATES = 512
QUANTILES = (0.05, 0.95)


class Curve(NamedTuple):
    """Expected quality of the labels of a class if a given number of images with the highest scores get the class.

    Attributes:
        counts: ``(r,)``, numbers of images that get the class, in increasing order.
        precision: ``(r,)``, expected precision for each number of images.
        recall: ``(r,)``, expected recall for each number of images.
        f1: ``(r,)``, expected F1 for each number of images.
    """

    counts: NDArray[np.int64]
    precision: Array
    recall: Array
    f1: Array


class Objective(ABC):
    """Base class of objectives, which choose the number of images that get a class."""

    @abstractmethod
    def choose(self, curve: Curve, share: int) -> int:
        """Returns the number of images that get the class.

        Args:
            curve: See :class:`Curve`.
            share: Number of images for which the fraction of positives is the same as in the labeled set.
        """


@dataclass(frozen=True)
class Share(Objective):
    """Assigns each class to the same fraction of images as in the labeled set; does not need probabilities."""

    def choose(self, curve: Curve, share: int) -> int:
        """See :class:`Objective`."""
        return share


@dataclass(frozen=True)
class F1(Objective):
    """Maximizes the expected F1."""

    def choose(self, curve: Curve, share: int) -> int:
        """See :class:`Objective`."""
        return int(curve.counts[curve.f1.argmax()])


@dataclass(frozen=True)
class _Target(Objective):
    target: float = 0.9

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(f"{name}: target", self.target, 0, 1)
        if self.target in (0, 1):
            raise ConfigError(f"{name}: target must be between 0 and 1, got {self.target}.")


@dataclass(frozen=True)
class Precision(_Target):
    """Labels as many images as possible while the expected precision is at least the target.

    No image is labeled if the target cannot be reached.

    Args:
        target: Lowest acceptable precision, in (0, 1).
    """

    def choose(self, curve: Curve, share: int) -> int:
        """See :class:`Objective`."""
        enough = np.flatnonzero(curve.precision >= self.target)
        return int(curve.counts[enough[-1]]) if len(enough) else 0


@dataclass(frozen=True)
class Recall(_Target):
    """Labels as few images as possible while the expected recall is at least the target.

    Args:
        target: Lowest acceptable recall, in (0, 1).
    """

    def choose(self, curve: Curve, share: int) -> int:
        """See :class:`Objective`."""
        enough = curve.recall >= self.target
        return int(curve.counts[enough.argmax()]) if enough.any() else int(curve.counts[-1])


class Decisions(NamedTuple):
    """Decision thresholds and the expected quality of the labels.

    Attributes:
        thresholds: ``(C,)``, probability at or above which an image gets the class; inf if no image gets it.
        expected: ``(C, 6)``, precision with its lower and upper bound, followed by recall with its lower and upper
            bound. Precision is NaN for a class that no image gets.
    """

    thresholds: Array
    expected: Array


def decide(logits: Array, calibration: Calibration, rates: Array, objective: Objective) -> Decisions:
    """Chooses the threshold of each class.

    Args:
        logits: ``(n, C)`` uncalibrated logits of the n > 0 unlabeled images.
        calibration: Calibration of each class.
        rates: ``(C,)``, fraction of positives among the labeled images.
        objective: Chooses the number of images that get each class.
    """
    rng = np.random.default_rng(0)
    shares = positive_counts(len(logits), torch.from_numpy(rates)).tolist()
    found = [
        _decide_class(logits[:, k], calibration.mode[k], calibration.covariance[k], shares[k], objective, rng)
        for k in range(logits.shape[1])
    ]
    thresholds, expected = zip(*found, strict=True)
    return Decisions(np.array(thresholds), np.array(expected))


def _decide_class(
    logits: Array, mode: Array, covariance: Array, share: int, objective: Objective, rng: np.random.Generator
) -> tuple[float, list[float]]:
    ordered = np.sort(logits.astype(np.float64))[::-1]
    n = len(ordered)
    # Candidate counts grow by a constant factor. Among the smallest counts, each one is a candidate.
    counts = np.unique(np.geomspace(1, n, CANDIDATES).round().astype(np.int64))
    group = np.diff(counts, prepend=0)
    means = np.add.reduceat(ordered, counts - group) / group
    draws = rng.multivariate_normal(mode, covariance, DRAWS)
    positives = np.cumsum(group * expit(draws[:, :1] + np.exp(draws[:, 1:]) * means), axis=1)  # (draws, r)
    total = positives[:, -1:]
    precision = (positives / counts).mean(0)
    recall = (positives / total).mean(0)
    f1 = (2 * positives / (counts + total)).mean(0)
    count = objective.choose(Curve(counts, precision, recall, f1), share)
    if count < 1:
        return np.inf, [np.nan, np.nan, np.nan, 0.0, 0.0, 0.0]
    # A threshold halfway between two images prevents rounding from moving an image to the other side.
    between = ordered[count - 1 : count + 1].mean() if count < n else -np.inf
    threshold = expit(mode[0] + np.exp(mode[1]) * between)
    hits_expected = np.array([np.interp(count, counts, row) for row in positives])
    hits = rng.binomial(count, np.clip(hits_expected / count, 0, 1))
    missed = rng.binomial(n - count, np.clip((total[:, 0] - hits_expected) / max(n - count, 1), 0, 1))
    precisions, recalls = hits / count, hits / np.maximum(hits + missed, 1)
    return float(threshold), [
        float(np.mean(hits_expected / count)),
        *np.quantile(precisions, QUANTILES).tolist(),
        float(np.mean(hits_expected / total[:, 0])),
        *np.quantile(recalls, QUANTILES).tolist(),
    ]
