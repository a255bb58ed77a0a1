"""The class-wise calibration maximizes its posterior, and its covariance is the inverse curvature at the maximum."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from cbsa_lightning.method.calibration import OFFSET_DEVIATION, SLOPE_DEVIATION, Calibration, fit_calibration


def problem(m=60, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, size=(m, 3))
    labels = (rng.random((m, 3)) < expit(1 + 0.5 * logits)).astype(np.int8)
    labels[:5, 1] = -1
    return logits, labels


def loss(mode, z, y):
    logit = mode[0] + np.exp(mode[1]) * z
    prior = (mode[0] / OFFSET_DEVIATION) ** 2 + (mode[1] / SLOPE_DEVIATION) ** 2
    return -np.where(y == 1, log_expit(logit), log_expit(-logit)).sum() + prior / 2


def test_calibration_maximizes_the_posterior():
    logits, labels = problem()
    found = fit_calibration(logits, labels)
    for k in range(3):
        known = labels[:, k] >= 0
        best = minimize(loss, np.zeros(2), (logits[known, k], labels[known, k]), tol=1e-12)
        np.testing.assert_allclose(found.mode[k], best.x, atol=1e-4)


def test_offset_and_slope_are_recovered_from_many_images():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, size=(20_000, 1))
    y = (rng.random(z.shape) < expit(0.7 + 1.4 * z)).astype(np.int8)
    offset, slope = fit_calibration(z, y).mode[0]
    assert (offset, np.exp(slope)) == pytest.approx((0.7, 1.4), abs=0.1)


@pytest.mark.parametrize("label", [-1, 0, 1])
def test_a_class_with_one_kind_of_label_stays_near_the_prior(label):
    logits, labels = problem()
    labels[:, 1] = label
    found = fit_calibration(logits, labels)
    assert np.isfinite(found.mode).all()
    assert np.isfinite(found.covariance).all()
    if label == -1:
        np.testing.assert_array_equal(found.mode[1], [0, 0])
        np.testing.assert_allclose(found.covariance[1], np.diag([OFFSET_DEVIATION**2, SLOPE_DEVIATION**2]))
    else:
        assert np.sign(found.mode[1, 0]) == 2 * label - 1


def test_constant_and_extreme_logits_give_finite_values():
    labels = np.array([[0, 1], [1, 0], [0, 1]], dtype=np.int8)
    for logits in (np.zeros((3, 2)), np.full((3, 2), 40.0), np.array([[1e3, -1e3]] * 3)):
        found = fit_calibration(logits, labels)
        assert np.isfinite(found.packed()).all()


def test_packed_values_restore_the_calibration():
    found = fit_calibration(*problem())
    again = Calibration.unpacked(found.packed())
    for ours, theirs in zip(found, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
