"""Class-wise calibration of logits, fitted to out-of-fold scores of the labeled images.

The stack is already calibrated jointly for all classes. Each class then gets its own offset and slope (Platt scaling
with a prior centered at "no change"), so that a class with few labeled positives keeps the common calibration. The
covariance of offset and slope is stored because the intervals of the estimated precision and recall depend on it.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

OFFSET_DEVIATION, SLOPE_DEVIATION = 1.0, 0.5
"""Standard deviations of the prior on a class's offset and on the logarithm of its slope.

They were chosen on the digits data set.
"""
STEPS = 50


class Calibration(NamedTuple):
    """Posterior of each class's calibration, a normal distribution around its mode.

    Attributes:
        mode: ``(C, 2)``, offset and logarithm of the slope.
        covariance: ``(C, 2, 2)``, covariance of offset and log-slope.
    """

    mode: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def packed(self) -> NDArray[np.float64]:
        """Returns mode and covariance as one array ``(6, C)`` for a checkpoint."""
        return np.concatenate([self.mode.T, self.covariance.reshape(len(self.mode), 4).T])

    @classmethod
    def unpacked(cls, values: NDArray[np.floating]) -> Self:
        """Inverts :meth:`packed`."""
        exact = values.astype(np.float64)
        return cls(exact[:2].T, exact[2:].T.reshape(-1, 2, 2))


def fit_calibration(logits: NDArray[np.floating], labels: NDArray[np.int8]) -> Calibration:
    """Fits the calibration of each class by maximum a posteriori estimation with Newton's method.

    Args:
        logits: ``(m, C)``, out-of-fold logits of the labeled images.
        labels: ``(m, C)`` in {1, 0, -1}; unknown entries are ignored.

    Returns:
        The posterior. For a class without a known entry, it equals the prior.
    """
    found = [_fit(z[y >= 0].astype(np.float64), y[y >= 0] == 1) for z, y in zip(logits.T, labels.T, strict=True)]
    mode, covariance = zip(*found, strict=True)
    return Calibration(np.stack(mode), np.stack(covariance))


def _fit(z: NDArray[np.float64], y: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    prior = np.array([OFFSET_DEVIATION, SLOPE_DEVIATION]) ** -2.0
    mode = np.zeros(2)
    for _ in range(STEPS):
        derivatives = np.stack([np.ones_like(z), np.exp(mode[1]) * z])  # derivatives of the logit
        p = expit(mode[0] + np.exp(mode[1]) * z)
        # This is the Gauss-Newton approximation. With the exact second derivative with respect to the log-slope, a step
        # could increase the loss.
        hessian = (derivatives * (p * (1 - p))) @ derivatives.T + np.diag(prior)
        step = np.linalg.solve(hessian, derivatives @ (y - p) - prior * mode)
        mode = mode + np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-8:
            break
    return mode, np.linalg.inv(hessian)
