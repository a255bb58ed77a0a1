"""The reliability diagram shows the bins of the expected calibration error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbsa_lightning.method.metrics import MultilabelReport
from cbsa_lightning.reports.reliability import BINS, reliability_diagram


def entries(n=500, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.random((n, 3))
    truths = (rng.random((n, 3)) < scores**1.5).astype(np.int8)
    truths[::7, 1] = -1
    return scores, truths


def points(figure):
    (line,) = [part for part in figure.axes[0].get_lines() if part.get_marker() == "o"]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_points_are_mean_score_and_fraction_of_positives_by_bin():
    scores, truths = entries()
    x, y = points(reliability_diagram(scores, truths))
    known = truths >= 0
    for i in range(BINS):
        here = known & (scores >= i / BINS) & (scores < (i + 1) / BINS)
        assert x[i] == pytest.approx(scores[here].mean())
        assert y[i] == pytest.approx((truths[here] == 1).mean())


def test_the_error_equals_the_logged_one():
    scores, truths = entries()
    report = MultilabelReport(3)
    report.update(torch.logit(torch.from_numpy(scores)).float(), torch.from_numpy(truths))
    title = reliability_diagram(scores, truths).axes[0].get_title()
    assert float(title.split()[-1]) == pytest.approx(float(report.compute()["ECE"]), abs=1e-3)


@pytest.mark.parametrize("scores", [np.zeros((4, 2)), np.ones((4, 2)), np.full((4, 2), 0.5), np.zeros((0, 2))])
def test_extreme_equal_and_missing_scores_are_plotted(scores):
    truths = np.zeros(scores.shape, dtype=np.int8)
    x, _ = points(reliability_diagram(scores, truths))
    assert len(x) == min(1, len(scores))
