"""The linear probe equals scikit-learn's logistic regression with one penalty for all classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from cbsa_lightning.method.labelers import Evidence
from cbsa_lightning.method.linear_probe import PENALTIES, LinearProbe


def linear_probe(x, labels, new):
    """Returns the logits of new images from a probe that is fitted to labeled images."""
    known, others = torch.from_numpy(x), torch.zeros(len(x), 3)
    stack = LinearProbe().fit(Evidence([known], [others], torch.arange(len(x)), torch.from_numpy(labels)))
    return stack.logits([new, np.ones((len(new), 3))])


def problem(m=40, n=25, dims=6):
    rng = np.random.default_rng(1)
    x = rng.normal(2, 3, size=(m + n, dims))
    labels = (x[:, :3] + rng.normal(0, 2, size=(m + n, 3)) > 2).astype(np.int8)
    return x[:m], labels[:m], x[m:]


def by_hand(x, labels, new, c):
    """Returns the logits of one regression per class, without unknown entries."""
    mean, deviation = x.mean(0), x.std(0)
    columns = []
    for k in range(labels.shape[1]):
        known = labels[:, k] >= 0
        fit = LogisticRegression(C=c, max_iter=1000).fit(((x - mean) / deviation)[known], labels[known, k])
        columns.append(fit.decision_function((new - mean) / deviation))
    return np.stack(columns, axis=1)


def test_the_penalty_minimizes_the_loss_on_held_out_images():
    x, labels, new = problem()
    labels[3, 1] = labels[7, 0] = -1
    shuffled = np.random.default_rng(0).permutation(len(x))
    z = ((x - x.mean(0)) / x.std(0))[shuffled]
    known = labels[shuffled]
    losses = {}
    for c in PENALTIES:
        total, count = 0.0, 0
        for fitted, others in KFold(5).split(z):
            for k in range(3):
                use = [i for i in fitted if known[i, k] >= 0]
                fit = LogisticRegression(C=c, max_iter=1000).fit(z[use], known[use, k])
                for i in others:
                    if known[i, k] >= 0:
                        p = expit(fit.decision_function(z[i : i + 1]))[0]
                        total -= np.log(p if known[i, k] == 1 else 1 - p)
                        count += 1
        losses[c] = total / count
    best = min(losses, key=losses.get)
    np.testing.assert_allclose(linear_probe(x, labels, new), by_hand(x, labels, new, best), atol=1e-6)


@pytest.mark.parametrize(("label", "positives"), [(0, 0), (1, 40)])
def test_a_class_with_one_kind_of_label_gets_its_rate(label, positives):
    x, labels, new = problem()
    labels[:, 1] = label
    logits = linear_probe(x, labels, new)
    np.testing.assert_allclose(expit(logits[:, 1]), (positives + 0.5) / 41)
    assert logits[:, 0].std() > 0


@pytest.mark.parametrize("m", [1, 2, 3])
def test_few_images_and_unknown_classes_give_finite_scores(m):
    x, labels, new = problem()
    labels[:, 2] = -1
    logits = linear_probe(x[:m], labels[:m], new)
    assert np.isfinite(logits).all()
    assert (logits[:, 2] == 0).all()


def test_constant_features_give_the_same_score_everywhere():
    _, labels, _ = problem()
    logits = linear_probe(np.ones((40, 4)), labels, np.ones((5, 4)))
    assert np.isfinite(logits).all()
    assert (logits == logits[:1]).all()


def test_out_of_fold_logits_come_from_probes_of_the_other_folds():
    x, labels, _ = problem()
    known = Evidence([torch.from_numpy(x)], [], torch.arange(len(x)), torch.from_numpy(labels))
    left_out = LinearProbe().fit(known).left_out()
    z = (x - x.mean(0)) / x.std(0)
    errors = []
    for c in PENALTIES:
        expected = np.empty(labels.shape)
        for fitted, others in KFold(5).split(z):
            for k in range(3):
                fit = LogisticRegression(C=c, max_iter=1000).fit(z[fitted], labels[fitted, k])
                expected[others, k] = fit.decision_function(z[others])
        errors.append(np.abs(expected - left_out).max())
    assert min(errors) < 1e-6
