"""Logistic regression on frozen features: what a user would try first, and the baseline to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

PENALTIES = tuple(10.0**power for power in range(-4, 1))
"""Inverse penalties C to choose from, for descriptors of unit variance."""
FOLDS = 5
MOST = 500
"""Labelled images that C is chosen on, at most; all of them are fitted with it."""


def linear_probe(
    labelled: NDArray[np.floating], labels: NDArray[np.int8], images: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Scores images by one logistic regression a class.

    All classes share one C, that with the lowest log-loss on images left out in five folds.

    Args:
        labelled: ``(m, D)``, descriptors of the labelled images.
        labels: ``(m, C)`` in {1, 0, -1}; an unknown entry is left out of its class.
        images: ``(n, D)``, descriptors of the images to score.

    Returns:
        ``(n, C)`` logits. A class without a positive or without a negative label gets the same one everywhere, that of
        its share of positives with half a positive and half a negative added.
    """
    scaler = StandardScaler().fit(labelled)
    x = scaler.transform(labelled)
    return _fit_and_score(x, labels, scaler.transform(images), _choose_penalty(x, labels))


def _choose_penalty(x: NDArray[np.floating], labels: NDArray[np.int8]) -> float:
    chosen = np.random.default_rng(0).permutation(len(x))[:MOST]
    x, labels = x[chosen], labels[chosen]
    if len(x) < 2 or not (labels >= 0).any():
        return PENALTIES[len(PENALTIES) // 2]
    folds = list(KFold(min(FOLDS, len(x))).split(x))
    known = labels >= 0

    def loss(c: float) -> float:
        left_out = np.empty(labels.shape)
        for fitted, others in folds:
            left_out[others] = expit(_fit_and_score(x[fitted], labels[fitted], x[others], c))
        return float(log_loss(labels[known], left_out[known], labels=[0, 1]))

    return min(PENALTIES, key=loss)


def _fit_and_score(
    x: NDArray[np.floating], labels: NDArray[np.int8], images: NDArray[np.floating], c: float
) -> NDArray[np.float64]:
    logits = np.empty((len(images), labels.shape[1]))
    for k, column in enumerate(labels.T):
        known = column >= 0
        positives = int((column == 1).sum())
        if 0 < positives < known.sum():
            fit = LogisticRegression(C=c, max_iter=1000).fit(x[known], column[known])
            logits[:, k] = fit.decision_function(images)
        else:
            logits[:, k] = np.log((positives + 0.5) / (known.sum() - positives + 0.5))
    return logits
