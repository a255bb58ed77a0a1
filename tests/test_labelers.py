import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.labelers import (
    ClassDistributionAware,
    Fixed,
    InstanceAware,
    Labeler,
    TopK,
    TopOne,
    class_thresholds,
    positive_rates,
    pseudo_labels,
)
from reference import labelers as reference

EVERY = [ClassDistributionAware(), TopOne(), TopK(2), InstanceAware(), Fixed()]


def distinct(n, num_classes, seed=0):
    """Returns scores without ties within a class."""
    generator = np.random.default_rng(seed)
    ranks = np.stack([generator.permutation(n) for _ in range(num_classes)], axis=1)
    return torch.from_numpy(((ranks + 0.5) / n).astype(np.float32))


def matrices(elements):
    shapes = st.tuples(st.integers(1, 30), st.integers(1, 4))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


probabilities = matrices(st.floats(0, 1, width=32))
few_values = matrices(st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@pytest.mark.parametrize(("eta_pos", "eta_neg"), [("1.0", "0.998"), ("0.5", "1.0"), ("1", "1"), ("0.9", "0.29")])
@pytest.mark.parametrize("n", [1, 7, 100, 997, 4104])
def test_thresholds_equal_the_sorted_definition(n, eta_pos, eta_neg):
    positives = torch.tensor([0, 1, 29, 50, 57, 99, 100])
    scores = distinct(n, len(positives))
    tau = class_thresholds(scores, positives.double() / 100, float(eta_pos), float(eta_neg))
    expected = reference.thresholds(scores.numpy(), positives, torch.full((7,), 100), eta_pos, eta_neg)
    np.testing.assert_array_equal(tau[0].numpy(), expected[0])
    np.testing.assert_array_equal(tau[1].numpy(), expected[1])
    labels = pseudo_labels(scores, *tau)
    assert labels.dtype == torch.int8
    np.testing.assert_array_equal(labels.numpy(), reference.label(scores.numpy(), *expected))


def test_counts_are_exact_for_every_possible_rate():
    m, n = 285, 1000
    counts = torch.arange(m + 1)
    labels = pseudo_labels(scores := distinct(n, m + 1), *class_thresholds(scores, counts.double() / m, 1.0, 1.0))
    assert (labels == 1).sum(dim=0).tolist() == [count * n // m for count in range(m + 1)]
    assert (labels == 0).sum(dim=0).tolist() == [(m - count) * n // m for count in range(m + 1)]


def test_float32_rates_do_not_lose_whole_counts():
    rates = torch.tensor([0.29, 0.57, 0.1, 0.7], dtype=torch.float32)
    labels = pseudo_labels(scores := distinct(100, 4), *class_thresholds(scores, rates))
    assert (labels == 1).sum(dim=0).tolist() == [29, 57, 10, 70]


def test_a_class_without_labeled_positive_gets_no_pseudo_positive():
    tau_pos, tau_neg = class_thresholds(torch.ones(50, 2), torch.tensor([0.0, 1.0]))
    assert tau_pos.tolist() == [math.inf, 1.0]
    assert tau_neg.tolist() == [1.0, -math.inf]
    labels = pseudo_labels(torch.ones(50, 2), tau_pos, tau_neg)
    assert (labels[:, 0] == 0).all()
    assert (labels[:, 1] == 1).all()


def test_default_fraction_of_ignored_entries():
    n = 10_000
    labels = ClassDistributionAware()(distinct(n, 3), torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)).labels
    # 0.2 % of the expected negatives, rounded down
    assert (labels == -1).sum(dim=0).tolist() == [n - 100 - 9880, n - 3000 - 6986, n - 9000 - 998]


def test_scores_equal_to_a_threshold_get_the_same_label():
    scores = torch.tensor([[0.9], [0.5], [0.5], [0.5], [0.1]])
    labels, tau_pos, tau_neg = ClassDistributionAware(1.0, 1.0)(scores, torch.tensor([0.4]))
    assert (tau_pos.item(), tau_neg.item()) == (0.5, 0.5)
    assert labels[:, 0].tolist() == [1, 1, 1, 1, 0]  # two positives are expected; a score in both ranges is positive


@settings(max_examples=60, deadline=None)
@given(st.one_of(probabilities, few_values), st.data())
def test_threshold_properties(scores, data):
    n, num_classes = scores.shape
    rate = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=num_classes, max_size=num_classes))).double()
    eta_pos, eta_neg = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    x = torch.from_numpy(scores)
    tau_pos, tau_neg = class_thresholds(x, rate, eta_pos, eta_neg)
    assert (tau_neg <= tau_pos).all()
    shuffled = class_thresholds(x[order], rate, eta_pos, eta_neg)
    assert torch.equal(shuffled[0], tau_pos)
    assert torch.equal(shuffled[1], tau_neg)
    labels = pseudo_labels(x, tau_pos, tau_neg)
    assert torch.equal(pseudo_labels(x[order], *shuffled), labels[order])
    # Monotone: in the order -1 between 0 and 1, a higher score never gets a lower label.
    level = torch.tensor([0, 2, 1])[labels.long()]
    for k in range(num_classes):
        assert (level[x[:, k].argsort(stable=True), k].diff() >= 0).all()
    # There are at least as many positives as expected, and more if there are ties.
    assert ((labels == 1).sum(dim=0) >= (eta_pos * rate * n).floor()).all()


@settings(max_examples=40, deadline=None)
@given(probabilities)
def test_every_labeler_follows_the_interface(scores):
    x = torch.from_numpy(scores)
    rate = torch.full((x.shape[1],), 0.3)
    for labeler in EVERY:
        if isinstance(labeler, TopK) and labeler.k > x.shape[1]:
            continue
        assert isinstance(labeler, Labeler)
        result = labeler(x, rate)
        assert result.labels.dtype == torch.int8
        assert result.labels.shape == x.shape
        assert result.tau_pos.shape == result.tau_neg.shape == rate.shape
        assert set(result.labels.unique().tolist()) <= {-1, 0, 1}
        if not result.tau_pos.isnan().any():  # predict applies the stored thresholds
            assert torch.equal(pseudo_labels(x, result.tau_pos, result.tau_neg), result.labels)


@given(few_values, st.integers(1, 4))
def test_top_k_equals_sorting_each_image(scores, k):
    k = min(k, scores.shape[1])
    x, rate = torch.from_numpy(scores), torch.zeros(scores.shape[1])
    result = TopK(k)(x, rate)
    np.testing.assert_array_equal(result.labels.numpy(), reference.top(scores, k))
    assert result.tau_pos.isnan().all()
    assert result.tau_neg.isnan().all()
    assert torch.equal(TopOne()(x, rate).labels, TopK(1)(x, rate).labels)


def test_fixed_thresholds():
    scores = torch.tensor([[0.96, 0.95, 0.5, 0.49, 0.05, 0.0]])
    rate = torch.zeros(6)
    assert InstanceAware()(scores, rate).labels.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert Fixed()(scores, rate).labels.tolist() == [[1, 1, -1, -1, 0, 0]]
    assert Fixed(0.6, 0.4)(scores, rate).tau_pos.tolist() == pytest.approx([0.6] * 6)


def test_positive_rates_count_known_entries_only():
    labels = torch.tensor([[1, 0, -1], [1, -1, -1], [0, 0, -1], [1, 1, -1]], dtype=torch.int8)
    assert positive_rates(labels).tolist() == [3 / 4, 1 / 3, 0.0]
    assert positive_rates(labels).dtype == torch.float64


def test_thresholds_that_are_not_set_assign_no_labels():
    unset = torch.full((2,), math.nan)
    assert pseudo_labels(torch.rand(3, 2), unset, unset).tolist() == [[-1, -1]] * 3


def test_scores_that_are_not_finite_are_counted():
    scores = torch.rand(10, 3)
    scores[2, 1] = scores[3, 1] = math.nan
    scores[4, 2] = math.inf
    for labeler in EVERY:
        with pytest.raises(DataError, match=r"3 of 30 scores are not finite; classes \(counts\): 1 \(2\), 2 \(1\)"):
            labeler(scores, torch.full((3,), 0.5))


def test_invalid_arguments_are_refused():
    scores = torch.rand(10, 3)
    with pytest.raises(DataError, match=r"class 1: 1\.5"):
        class_thresholds(scores, torch.tensor([0.1, 1.5, 0.2]))
    with pytest.raises(DataError, match="class 0: nan"):
        class_thresholds(scores, torch.tensor([math.nan, 0.5, 0.2]))
    with pytest.raises(DataError, match="3 classes need one rate each"):
        class_thresholds(scores, torch.tensor([0.1]))
    with pytest.raises(DataError, match="no scores"):
        class_thresholds(torch.empty(0, 3), torch.zeros(3))
    with pytest.raises(DataError, match="thresholds must be"):
        pseudo_labels(scores, torch.zeros(1), torch.zeros(3))
    with pytest.raises(DataError, match="images, classes"):
        TopOne()(torch.rand(3), torch.zeros(3))
    with pytest.raises(ConfigError, match="only 3 classes"):
        TopK(4)(scores, torch.zeros(3))
    with pytest.raises(ConfigError, match="at least 1"):
        TopK(0)
    with pytest.raises(ConfigError, match="eta"):
        ClassDistributionAware(eta_pos=1.1)
    with pytest.raises(ConfigError, match=r"the negative threshold 0\.6 exceeds the positive threshold 0\.4"):
        Fixed(0.4, 0.6)
    with pytest.raises(ConfigError, match="the positive threshold must be a number"):
        InstanceAware(math.nan)
