"""Decision thresholds meet their objective, and their intervals have the nominal coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import precision_score, recall_score

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.calibration import Calibration, fit_calibration
from cbsa_lightning.method.decisions import F1, Precision, Recall, Share, decide

EXACT = Calibration(np.zeros((1, 2)), np.zeros((1, 2, 2)))
RATES = np.array([0.3])


def scores(n=20_000, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 2.5, size=(n, 1))
    return logits, (rng.random((n, 1)) < expit(logits)).astype(int)


@pytest.mark.parametrize(("objective", "measure"), [(Precision(0.9), precision_score), (Recall(0.9), recall_score)])
def test_a_target_is_met_with_the_fewest_errors(objective, measure):
    logits, truth = scores()
    found = decide(logits, EXACT, RATES, objective)
    given = expit(logits) >= found.thresholds
    assert measure(truth, given) == pytest.approx(0.9, abs=0.01)


def test_the_f1_objective_chooses_the_best_threshold():
    logits, truth = scores()
    threshold = decide(logits, EXACT, RATES, F1()).thresholds[0]

    def f1(t):
        given = expit(logits) >= t
        return 2 * (given * truth).sum() / (given.sum() + truth.sum())

    assert f1(threshold) > max(f1(t) for t in np.linspace(0.05, 0.95, 91)) - 0.003


def test_a_share_predicts_the_class_for_exactly_that_many_images():
    logits, _ = scores(1000)
    found = decide(logits, EXACT, np.array([0.123]), Share())
    assert (expit(logits) >= found.thresholds).sum() == 123


def test_expected_precision_and_recall_are_sums_of_probabilities():
    logits, _ = scores(1000)
    found = decide(logits, EXACT, RATES, Share())
    p = np.sort(expit(logits[:, 0]))[::-1]
    precision, recall = found.expected[0, [0, 3]]
    assert precision == pytest.approx(p[:300].mean(), abs=0.01)
    assert recall == pytest.approx(p[:300].sum() / p.sum(), abs=0.01)


def test_a_class_is_not_predicted_if_all_images_are_too_uncertain():
    logits = np.full((50, 1), logit(0.6))
    found = decide(logits, EXACT, RATES, Precision(0.9))
    assert found.thresholds[0] == np.inf
    assert np.isnan(found.expected[0, 0])
    assert found.expected[0, 3] == 0


@pytest.mark.parametrize("objective", [Share(), F1(), Precision(), Recall()])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_few_or_equal_scores_give_defined_thresholds(objective, n):
    found = decide(np.zeros((n, 1)), EXACT, RATES, objective)
    assert not np.isnan(found.thresholds).any()
    assert not np.isnan(found.expected[0, 3:]).any()


def test_intervals_have_nominal_coverage():
    """Uses calibrations on 60 labeled images, with offsets and slopes from the prior, in 150 repetitions."""
    rng = np.random.default_rng(1)
    held = []
    for _ in range(150):
        offset, slope = rng.normal(0, 1), np.exp(rng.normal(0, 0.5))
        z = rng.normal(-1, 2, size=(1060, 1))
        truth = (rng.random(z.shape) < expit(offset + slope * z)).astype(np.int8)
        calibration = fit_calibration(z[:60], truth[:60])
        found = decide(z[60:], calibration, truth[:60].mean(0), F1())
        p = expit(calibration.mode[0, 0] + np.exp(calibration.mode[0, 1]) * z[60:])
        given = p >= found.thresholds
        precision, recall = precision_score(truth[60:], given), recall_score(truth[60:], given)
        held += [found.expected[0, 1] <= precision <= found.expected[0, 2]]
        held += [found.expected[0, 4] <= recall <= found.expected[0, 5]]
    assert 0.85 <= np.mean(held) <= 0.95


@pytest.mark.parametrize("target", [0, 1, -0.1, 2, "0.9"])
@pytest.mark.parametrize("objective", [Precision, Recall])
def test_invalid_targets_are_refused(objective, target):
    with pytest.raises(ConfigError, match=f"{objective.__name__}: target"):
        objective(target)
