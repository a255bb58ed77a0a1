"""Compares stacked probes with slow recomputations, and evaluates them on data with known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.labelers import Evidence, rounded
from cbsa_lightning.method.stacking import ALPHAS, StackedProbes, probe, ready


def problem(n=400, m=60, classes=4, noise=1.0, seed=0):
    """Returns labels that depend on 12 descriptors; the rarest class has about one positive in fifteen images."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 12))
    raw = x @ rng.normal(size=(12, classes)) / 12**0.5 + noise * rng.normal(size=(n, classes))
    labels = (raw > np.quantile(raw, np.linspace(0.5, 0.93, classes), axis=0).diagonal()).astype(np.int8)
    return x, labels, np.sort(rng.permutation(n)[:m])


def evidence(x, labels, rows, scores=()):
    return Evidence(
        [torch.as_tensor(x)], [torch.as_tensor(s) for s in scores], torch.as_tensor(rows), torch.as_tensor(labels[rows])
    )


def test_leave_one_out_scores_equal_probes_without_the_image():
    x, labels, rows = problem()
    known = labels[rows].copy()
    known[3, 1] = known[10, 0] = -1
    z = (x - x.mean(0)) / x.std(0)
    rate = (known == 1).sum(0) / (known >= 0).sum(0)
    y = ((known == 1) - rate) / np.sqrt(rate * (1 - rate))
    errors = {}
    for alpha in ALPHAS:  # the slow reference: one fit per image and class
        left, scores = np.zeros(y.shape), np.zeros((len(x), y.shape[1]))
        for k in range(y.shape[1]):
            told = known[:, k] >= 0
            scores[:, k] = Ridge(alpha, fit_intercept=False).fit(z[rows][told], y[told, k]).predict(z)
            for i in range(len(rows)):
                others = told & (np.arange(len(rows)) != i)
                fit = Ridge(alpha, fit_intercept=False).fit(z[rows][others], y[others, k])
                left[i, k] = fit.predict(z[rows][i : i + 1])[0]
        errors[alpha] = ((left - y) ** 2)[known >= 0].sum(), left, scores
    best = min(errors, key=lambda a: errors[a][0])
    _, left, scores = errors[best]
    others = np.delete(scores, rows, axis=0)
    ours = probe(x, rows, known)
    expected = [np.clip((s - others.mean(0)) / others.std(0), -6, 6) for s in (scores, left)]
    np.testing.assert_allclose(ours(x), expected[0], atol=1e-6)
    np.testing.assert_allclose(ours.left_out, expected[1], atol=1e-6)


def test_unknown_entries_are_better_than_counting_them_as_absent():
    found = {-1: [], 0: []}
    for seed in range(6):
        x, labels, rows = problem(n=1500, m=200, seed=seed)
        unknown = np.random.default_rng(seed).random((200, 4)) < 0.5
        for value, scores in found.items():
            told = labels.copy()
            told[rows] = np.where(unknown, value, labels[rows])
            p, rest = StackedProbes()(evidence(x, told, rows)).numpy(), np.delete(labels, rows, axis=0)
            scores.append(np.mean([average_precision_score(rest[:, k], p[:, k]) for k in range(4)]))
    assert np.mean(found[-1]) > np.mean(found[0]) + 0.01


def test_given_scores_are_only_scaled():
    scores = np.random.default_rng(0).normal(3, 7, size=(50, 3))
    scores[:, 2] = 5.0
    opinion = ready(scores, np.arange(4))
    scaled = opinion(scores)
    np.testing.assert_allclose(scaled[:, :2].std(0), 1)
    assert (scaled[:, 2] == 0).all()
    np.testing.assert_array_equal(opinion.left_out, scaled[:4])


def test_the_stack_equals_a_manual_computation():
    """With one classifier, the stack is a single regression over all entries."""
    x, labels, rows = problem()
    trust = 3.0
    ours = StackedProbes(trust)(evidence(x, labels, rows))
    opinion = probe(x, rows, labels[rows])
    everywhere = opinion(x)
    n = labels[rows].sum(0)
    prior = np.log((n + 0.5) / (len(rows) - n + 0.5))

    def inputs(z, k):
        return [z, z * n[k] / (n[k] + trust), prior[k]]

    pairs = [(i, k) for i in range(len(rows)) for k in range(4)]
    fit = LogisticRegression(max_iter=1000).fit(
        [inputs(opinion.left_out[i, k], k) for i, k in pairs], [labels[rows[i], k] for i, k in pairs]
    )
    rest = np.delete(np.arange(len(x)), rows)
    expected = [[fit.predict_proba([inputs(everywhere[i, k], k)])[0, 1] for k in range(4)] for i in rest]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_probabilities_are_calibrated_and_rank_well():
    ratios, hits = [], []
    for seed in range(8):
        x, labels, rows = problem(n=1500, m=150, seed=seed)
        truth = np.delete(labels, rows, axis=0)
        p = StackedProbes()(evidence(x, labels, rows)).numpy()
        ratios.append(p.mean() / truth.mean())
        hits.append(truth[p > 0.8].mean())
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)
    assert np.mean(hits) > 0.8


def test_the_weight_of_a_classifier_depends_on_its_accuracy():
    """Informative scores change the probabilities, and noise hardly changes them."""
    x, labels, rows = problem(noise=3.0)
    rng = np.random.default_rng(1)
    truth = np.delete(labels, rows, axis=0)

    def error(*scores):
        p = StackedProbes()(evidence(x, labels, rows, scores)).numpy()
        return -np.mean(np.where(truth == 1, np.log(p), np.log(1 - p)))

    alone, good = error(), error(labels + 0.3 * rng.normal(size=labels.shape))
    noise = error(rng.normal(size=labels.shape))
    assert good < 0.5 * alone
    assert noise < alone + 0.03


@pytest.mark.parametrize("dimensions", [12, 200])
def test_an_uninformative_descriptor_does_no_harm(dimensions):
    """Leave-one-out scores must not leak the label, because a weak probe would then get a negative weight."""
    harm, alone = [], []
    for seed in range(6):
        _, labels, rows = problem(noise=3.0, seed=seed)
        rng = np.random.default_rng(seed + 100)
        score = labels + rng.normal(size=labels.shape)
        truth = np.delete(labels, rows, axis=0)
        noise = rng.normal(size=(len(labels), dimensions))
        with_, without = (
            StackedProbes()(evidence(noise, labels, rows, [score])).numpy(),
            StackedProbes()(evidence(noise, labels, rows, [score])._replace(descriptors=[])).numpy(),
        )
        loss = [-np.mean(np.where(truth == 1, np.log(p), np.log(1 - p))) for p in (with_, without)]
        harm.append(loss[0] - loss[1])
        alone.append(loss[1])
    assert np.mean(harm) < 0.02
    assert np.mean(alone) < 0.5


def test_classes_without_known_labels_are_ignored():
    x, labels, rows = problem()
    labels[:, 2] = -1
    p = StackedProbes()(evidence(x, labels, rows))
    assert (p[:, 2] == -1).all()
    assert (p[:, [0, 1, 3]] > 0).all()


def test_new_images_are_scored_like_unlabeled_images_of_the_fit():
    x, labels, rows = problem()
    known = evidence(x, labels, rows)
    stack = StackedProbes().fit(known)
    rest = np.delete(np.arange(len(x)), rows)
    parts = [part.numpy() for part in (*known.descriptors, *known.scores)]
    one_by_one = np.concatenate([stack.logits([part[i : i + 1] for part in parts]) for i in rest])
    np.testing.assert_allclose(1 / (1 + np.exp(-one_by_one)), StackedProbes()(known).numpy(), atol=1e-6)
    assert stack.left_out().shape == (len(rows), labels.shape[1])


def test_the_result_without_unlabeled_images_is_empty():
    x, labels, _ = problem()
    assert StackedProbes()(evidence(x, labels, np.arange(len(x)))).shape == (0, 4)


def test_a_class_without_labeled_positives_gets_small_probabilities():
    x, labels, rows = problem()
    labels[:, 3] = 0
    labels[np.setdiff1d(np.arange(len(x)), rows)[:5], 3] = 1  # there are positives, but none is labeled
    p = StackedProbes()(evidence(x, labels, rows))
    assert (rounded(p)[:, 3] == 0).all()
    assert 0 < p[:, 3].max() < 0.2


def test_order_of_images_and_hidden_labels_do_not_matter():
    x, labels, rows = problem()
    p = StackedProbes()(evidence(x, labels, rows))
    hidden = labels.copy()
    rest = np.setdiff1d(np.arange(len(x)), rows)
    hidden[rest] = 1 - hidden[rest]
    assert torch.equal(p, StackedProbes()(evidence(x, hidden, rows)))
    shuffled = np.random.default_rng(2).permutation(len(x))
    back = np.argsort(shuffled)
    other = StackedProbes()(
        Evidence([torch.as_tensor(x[shuffled])], [], torch.as_tensor(back[rows]), torch.as_tensor(labels[rows]))
    )
    place = np.argsort(np.argsort(back[rest]))
    np.testing.assert_allclose(other.numpy()[place], p.numpy(), atol=1e-4)


def test_too_few_labels_are_refused():
    x, labels, rows = problem()
    with pytest.raises(DataError, match="1 labeled images"):
        StackedProbes()(evidence(x, labels, rows[:1]))
    with pytest.raises(DataError, match="0 positives"):
        StackedProbes()(evidence(x, 0 * labels, rows))
    with pytest.raises(ConfigError, match="trust"):
        StackedProbes(0)


def test_rounded():
    soft = torch.tensor([0.0, 0.49, 0.5, 1.0, -1.0], dtype=torch.float16)
    assert rounded(soft).tolist() == [0, 0, 1, 1, -1]
    assert rounded(soft).dtype == torch.int8
    assert rounded(torch.tensor([1, 0, -1], dtype=torch.int8)).tolist() == [1, 0, -1]
