"""Logistic regression on frozen features, which is the simplest baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from cbsa_lightning.method.labelers import Evidence
from cbsa_lightning.method.stacking import Array, Opinion, Stack, StackLabeler

PENALTIES = tuple(10.0**power for power in range(-4, 1))
"""Candidates for the inverse penalty C, for descriptors with unit variance."""
FOLDS = 5
MOST = 500
"""Maximum number of labeled images that are used to select C; the final fit uses all labeled images."""


@dataclass(frozen=True)
class LinearProbe(StackLabeler):
    """Fits one logistic regression per class to the mean of the frozen features.

    All classes share one value of C, which is selected by the log-loss in five-fold cross-validation. Unknown entries
    are ignored. A class without a positive or without a negative label gets the same logit for all images: the logit of
    its positive rate, which is smoothed by adding half a positive and half a negative.
    """

    def fit(self, evidence: Evidence) -> Stack:
        """See :class:`StackLabeler`; only the first descriptor is used."""
        labels = evidence.labels.cpu().numpy()
        x = evidence.descriptors[0][evidence.labeled].cpu().numpy()
        scaler = StandardScaler().fit(x)
        x = scaler.transform(x)
        c = _choose_penalty(x, labels)
        probe = _fit(x, labels, c)
        first = Opinion(scaler.mean_, probe.weight / scaler.scale_[:, None], probe.offset, _left_out(x, labels, c))
        others = [*evidence.descriptors[1:], *evidence.scores]
        unused = [_unused(part.shape[1], first.left_out.shape) for part in others]
        slopes = np.zeros((1 + len(unused), labels.shape[1]))
        slopes[0] = 1.0
        return Stack([first, *unused], slopes, np.zeros(labels.shape[1]), np.inf)


class _Probe(NamedTuple):
    """Weights ``(D, C)`` and offsets ``(C,)``."""

    weight: Array
    offset: Array


def _choose_penalty(x: Array, labels: NDArray[np.int8]) -> float:
    chosen = np.random.default_rng(0).permutation(len(x))[:MOST]
    x, labels = x[chosen], labels[chosen]
    known = labels >= 0
    if len(x) < 2 or not known.any():
        return PENALTIES[len(PENALTIES) // 2]
    return min(
        PENALTIES, key=lambda c: float(log_loss(labels[known], expit(_left_out(x, labels, c))[known], labels=[0, 1]))
    )


def _left_out(x: Array, labels: NDArray[np.int8], c: float) -> Array:
    """Returns out-of-fold logits ``(m, C)``."""
    if len(x) < 2:
        return np.tile(_fit(x, labels, c).offset, (len(x), 1))
    logits = np.empty(labels.shape)
    for fitted, others in KFold(min(FOLDS, len(x))).split(x):
        probe = _fit(x[fitted], labels[fitted], c)
        logits[others] = x[others] @ probe.weight + probe.offset
    return logits


def _fit(x: Array, labels: NDArray[np.int8], c: float) -> _Probe:
    weight, offset = np.zeros((x.shape[1], labels.shape[1])), np.empty(labels.shape[1])
    for k, column in enumerate(labels.T):
        known = column >= 0
        positives = int((column == 1).sum())
        if 0 < positives < known.sum():
            fit = LogisticRegression(C=c, max_iter=1000).fit(x[known], column[known])
            weight[:, k], offset[k] = fit.coef_[0], fit.intercept_[0]
        else:
            offset[k] = np.log((positives + 0.5) / (known.sum() - positives + 0.5))
    return _Probe(weight, offset)


def _unused(size: int, shape: tuple[int, ...]) -> Opinion:
    return Opinion(np.zeros(size), np.zeros((size, shape[1])), np.zeros(shape[1]), np.zeros(shape))
