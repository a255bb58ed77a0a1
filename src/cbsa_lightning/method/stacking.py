"""Stacked probes, which combine linear classifiers on frozen features with CLIP's zero-shot scores.

They use stacked generalization (Wolpert, Neural Networks 1992) and do not train a network. Each labeled image is scored
by probes that were not fitted to it, so the weights of the opinions can be learned from the labeled images as well. The
unlabeled images are used only to compute means and standard deviations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from torch import Tensor

from cbsa_lightning.arguments import check_number
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.labelers import Evidence, EvidenceLabeler

Array = NDArray[np.floating]

ALPHAS = tuple(10.0**power for power in range(7))  # ridge penalties, for descriptors of unit variance
LIMIT = 6.0  # number of standard deviations at which an opinion is clipped


class Opinion(NamedTuple):
    """Scores of a linear classifier, standardized per class over the images.

    Attributes:
        mean: ``(D,)``, mean of the inputs. It is subtracted from the inputs first, because it can be large relative to
            their standard deviations.
        weight: ``(D, C)``, weights of the classifier.
        offset: ``(C,)``, offsets of the classifier.
        left_out: ``(m, C)``, out-of-fold scores of the labeled images.
    """

    mean: Array
    weight: Array
    offset: Array
    left_out: Array

    def __call__(self, inputs: Array) -> Array:
        """Returns scores ``(n, C)`` of images from ``(n, D)`` inputs, which are descriptors or given scores."""
        scores: Array = (inputs - self.mean) @ self.weight + self.offset
        return scores


class Stack(NamedTuple):
    """A fitted combination of opinions.

    Attributes:
        opinions: One opinion for each descriptor, followed by one for each set of given scores.
        slopes: ``(k, C)``, weight of each opinion in the logit of each class.
        offset: ``(C,)``, the logit if all opinions are 0.
        limit: Number of standard deviations at which an opinion is clipped.
    """

    opinions: list[Opinion]
    slopes: Array
    offset: Array
    limit: float = LIMIT

    def logits(self, inputs: Sequence[Array]) -> Array:
        """Returns logits ``(n, C)`` of images from one input per opinion."""
        return self._combined([opinion(x) for opinion, x in zip(self.opinions, inputs, strict=True)])

    def left_out(self) -> Array:
        """Returns out-of-fold logits ``(m, C)`` of the labeled images."""
        return self._combined([opinion.left_out for opinion in self.opinions])

    def _combined(self, scores: list[Array]) -> Array:
        limited = [np.clip(part, -self.limit, self.limit) for part in scores]
        logits: Array = self.offset + sum(slope * part for slope, part in zip(self.slopes, limited, strict=True))
        return logits


class StackLabeler(EvidenceLabeler):
    """Base class of labelers that compute soft pseudo-labels with a :class:`Stack`.

    If ``stack_share`` is set, the final scores include the stack's logits.
    """

    @abstractmethod
    def fit(self, evidence: Evidence) -> Stack:
        """Fits the stack.

        Raises:
            DataError: If there are too few labeled images.
        """

    def __call__(self, evidence: Evidence) -> Tensor:
        """See :class:`EvidenceLabeler`."""
        return soft_labels(self.fit(evidence).logits(unlabeled_inputs(evidence)), evidence)


@dataclass(frozen=True)
class StackedProbes(StackLabeler):
    """Computes soft pseudo-labels once, as probabilities that combine linear probes and CLIP's zero-shot scores.

    A ridge probe is fitted to each descriptor. A logistic regression over all known entries of the labeled images then
    learns the weights of the probes and of the zero-shot scores; the probes' scores are :func:`leave-one-out <probe>`
    scores. All classes share one weight per opinion, except that the weight of an opinion may grow with the number n of
    a class's labeled positives in proportion to n / (n + trust), because a probe that is fitted to two positives is
    less reliable than one that is fitted to fifty. The positive rate of a class is shrunk towards one half with
    Jeffreys' prior, so that a class without labeled positives gets small but nonzero probabilities. A class without a
    known entry is ignored.

    Args:
        trust: number of labeled positives at which a class's probe gets half of its maximum weight, > 0.

    Raises:
        ConfigError: If ``trust`` is 0 or less.
    """

    trust: float = 4.0

    def __post_init__(self) -> None:
        check_number("StackedProbes: trust", self.trust, 0)
        if self.trust == 0:
            raise ConfigError(f"stacked probes: trust must be above 0, got {self.trust}")

    def fit(self, evidence: Evidence) -> Stack:
        """Fits the probes and their weights.

        Raises:
            DataError: If there are too few labeled images.
        """
        labels = evidence.labels.cpu().numpy()
        known, positive = labels >= 0, labels == 1
        if len(labels) < 2 or not positive.any() or not (known & ~positive).any():
            raise DataError(
                "Stacked probes need at least two labeled images with a positive and a negative entry; the "
                f"{len(labels)} labeled images have {positive.sum()} positives. Label more images, or choose another "
                "labeler (cbsa_lightning.method.labelers)."
            )
        rows = evidence.labeled.cpu().numpy()
        opinions = [probe(_array(d), rows, labels) for d in evidence.descriptors]
        opinions += [ready(_array(s), rows) for s in evidence.scores]
        n = positive.sum(0)
        say = n / (n + self.trust)
        rate = (n + 0.5) / (known.sum(0) + 1.0)
        prior = np.log(rate / (1 - rate))
        # The inputs of the regression are a plain and a scaled copy of each opinion, and the prior of the class.
        inputs = [z.left_out for z in opinions]
        columns = [*inputs, *(z * say for z in inputs), np.broadcast_to(prior, known.shape)]
        design = np.stack([column[known] for column in columns], axis=1)
        fit = LogisticRegression(max_iter=1000).fit(design, positive[known])
        plain, scaled = np.split(fit.coef_[0, :-1], 2)
        return Stack(opinions, plain[:, None] + scaled[:, None] * say, fit.coef_[0, -1] * prior + fit.intercept_[0])


def probe(descriptors: Array, labeled: NDArray[np.int64], labels: NDArray[np.int8]) -> Opinion:
    """Fits a ridge regression to all classes at once, and selects the penalty by the leave-one-out error.

    Args:
        descriptors: ``(N, D)``, one row per image.
        labeled: ``(m,)``, indices of the labeled rows.
        labels: ``(m, C)`` in {1, 0, -1}; each class is fitted to its known entries. If the label of an image is unknown
            for a class, the image counts as left out of that class.
    """
    mean, scale = _moments(descriptors)
    x = (descriptors - mean.astype(descriptors.dtype)) * scale.astype(descriptors.dtype)
    known, positive = labels >= 0, labels == 1
    rate = positive.sum(0) / np.maximum(known.sum(0), 1)
    deviation = np.sqrt(rate * (1 - rate))
    # Targets with unit variance make one penalty suitable for both rare and frequent classes.
    y = np.where(known, (positive - rate) / np.where(deviation > 0, deviation, 1), 0.0)
    coefficients, left_out = _ridge(x[labeled].astype(np.float64), y, known)
    # The probe fits its training images too well, so the scale is estimated on the other images if there are any.
    others = np.delete(x, labeled, axis=0)
    mean_score, score_scale = _moments((others if len(others) else x) @ coefficients.astype(x.dtype))
    weight = scale[:, None] * coefficients * score_scale
    left_out = np.clip((left_out - mean_score) * score_scale, -LIMIT, LIMIT)
    return Opinion(mean.astype(x.dtype), weight.astype(x.dtype), -mean_score * score_scale, left_out)


def _ridge(x: Array, y: Array, known: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Returns coefficients ``(D, C)`` and leave-one-out predictions ``(m, C)``; all classes share one penalty."""
    coefficients, left_out = np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape)
    patterns, pattern_of = np.unique(known, axis=1, return_inverse=True)
    fits, errors = [], np.zeros(len(ALPHAS))
    for i, rows in enumerate(patterns.T):  # classes with the same known entries are fitted together
        classes = np.flatnonzero(pattern_of.reshape(-1) == i)
        if rows.sum() < 2:
            continue
        # An intercept would reveal the label of the left-out image, because it is a mean over the other images. The
        # weaker the probe, the stronger this effect.
        ridge = RidgeCV(ALPHAS, fit_intercept=False, scoring="neg_mean_squared_error", store_cv_results=True)
        target = y[rows][:, classes]
        fit = ridge.fit(x[rows], target)
        without = np.asarray(fit.cv_results_).reshape(*target.shape, len(ALPHAS))
        errors += ((without - target[..., None]) ** 2).sum((0, 1))
        fits.append((rows, classes, fit, without))
    chosen = int(errors.argmin())
    for rows, classes, fit, without in fits:
        if fit.alpha_ != ALPHAS[chosen]:
            fit = Ridge(ALPHAS[chosen], fit_intercept=False).fit(x[rows], y[rows][:, classes])
        coefficients[:, classes] = fit.coef_.reshape(len(classes), -1).T
        left_out[:, classes] = x @ coefficients[:, classes]
        left_out[np.ix_(rows, classes)] = without[..., chosen]
    return coefficients, left_out


def ready(scores: Array, labeled: NDArray[np.int64]) -> Opinion:
    """Converts scores ``(N, C)`` that were computed without labels to an opinion."""
    mean, scale = _moments(scores)
    nothing = np.zeros(len(mean))
    opinion = Opinion(mean.astype(scores.dtype), np.diag(scale).astype(scores.dtype), nothing, nothing)
    return opinion._replace(left_out=np.clip(opinion(scores[labeled]), -LIMIT, LIMIT))


def _moments(values: Array) -> tuple[Array, Array]:
    """Returns the mean and the inverse standard deviation of each column; the latter is 0 for a constant column."""
    mean, deviation = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    varies = deviation > 1e-8
    return mean, varies / np.where(varies, deviation, 1.0)


def soft_labels(logits: Array, evidence: Evidence) -> Tensor:
    """Returns soft labels ``(n, C)`` from a stack's logits; -1 for a class without known entries."""
    probabilities = expit(logits)
    probabilities[:, ~(evidence.labels.cpu().numpy() >= 0).any(0)] = -1
    return torch.from_numpy(probabilities).float()


def unlabeled_inputs(evidence: Evidence) -> list[Array]:
    """Returns the inputs of a :class:`Stack`'s opinions for the unlabeled images."""
    rows = evidence.labeled.cpu().numpy()
    return [np.delete(_array(part), rows, axis=0) for part in (*evidence.descriptors, *evidence.scores)]


def _array(values: Tensor) -> Array:
    array: Array = values.detach().cpu().float().numpy()
    return array
