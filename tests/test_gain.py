"""Compares the estimated gain with scikit-learn and slow recomputations, and tests what a check trains and reads."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.training import gain as gain_module
from cbsa_lightning.training.gain import GainCheck, average_precision, deal, gain_of
from tiny_data import CLASSES, Squares, tiny_data, tiny_module


def scores_and_truth(m=40, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random((m, classes)) < 0.3).astype(np.int64)
    return np.round(truth + rng.normal(0, 1.5, truth.shape), 1), truth  # rounding creates ties


def test_average_precision_equals_scikit_learn_with_weights_and_ties():
    scores, truth = scores_and_truth(60)
    truth[5, 0] = truth[8, 0] = -1
    weights = np.random.default_rng(1).multinomial(60, [1 / 60] * 60, 20)
    ours = average_precision(scores[:, 0], truth[:, 0], weights.astype(float))
    known = truth[:, 0] >= 0
    for got, weight in zip(ours, weights, strict=True):
        expected = average_precision_score(truth[known, 0], scores[known, 0], sample_weight=weight[known])
        assert got == pytest.approx(expected, abs=1e-12)


def test_average_precision_without_sampled_positives_is_nan():
    assert np.isnan(average_precision(np.array([1.0, 0.0]), np.array([0, 1]), np.array([[2.0, 0.0]]))).all()


def test_gain_equals_a_manual_computation():
    """Ranks scores within two folds and computes scikit-learn's AP of the combined ranks."""
    parts = [scores_and_truth(30, seed=s) for s in (0, 1)]
    better = [(s + 5 * t, t) for s, t in parts]
    # The scale of the scores in a fold has no effect.
    better[1] = (1000 + 0.01 * better[1][0], better[1][1])
    gain = gain_of([p[0] for p in parts], [b[0] for b in better], [p[1] for p in parts], list("abc"), 30)

    def together(folds, k):
        below = np.concatenate([[(s[:, k] < v).mean() for v in s[:, k]] for s, _ in folds])
        return average_precision_score(np.concatenate([t[:, k] for _, t in folds]), below)

    expected = [100 * (together(better, k) - together(parts, k)) for k in range(3)]
    np.testing.assert_allclose(gain.by_class[:, 0], expected)
    assert gain.overall[0] == pytest.approx(np.mean(expected))
    assert gain.overall[1] < gain.overall[0] < gain.overall[2]
    assert gain.overall[1] > 0
    assert "help: +" in gain.sentence()
    assert not gain.hurts


def test_no_gain_and_negative_gain():
    scores, truth = scores_and_truth()
    same = gain_of([scores], [scores], [truth], list("abc"), 20)
    np.testing.assert_array_equal(same.overall, 0)
    assert "are too few to tell" in same.sentence()
    harm = gain_of([scores + 5 * truth], [scores], [truth], list("abc"), 20)
    assert harm.hurts
    assert "hurt" in harm.sentence()


def test_the_interval_has_nominal_coverage():
    """If both networks are equally good, most 90 % intervals contain zero; percentile intervals are slightly short."""
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = (rng.random((80, 4)) < 0.3).astype(np.int64)
        arms = [truth + rng.normal(0, 1, truth.shape) for _ in range(2)]
        gain = gain_of([arms[0]], [arms[1]], [truth], list("abcd"), 40, seed)
        inside += gain.overall[1] <= 0 <= gain.overall[2]
    assert 48 <= inside <= 59


def test_classes_with_too_few_positives_are_excluded():
    scores, truth = scores_and_truth()
    truth[:, 1] = 0
    truth[:2, 1] = 1
    gain = gain_of([scores], [scores + truth], [truth], list("abc"), 20)
    assert np.isnan(gain.by_class[1]).all()
    assert "2 of 3 classes" in gain.sentence()
    assert gain.overall[0] == pytest.approx(np.nanmean(gain.by_class[:, 0]))
    with pytest.raises(DataError, match="no class has 3"):
        gain_of([scores], [scores], [0 * truth], list("abc"), 20)


def test_folds_are_stratified_by_the_rarest_label():
    rng = np.random.default_rng(0)
    labels = (rng.random((97, 5)) < [0.5, 0.3, 0.1, 0.06, 0.04]).astype(np.int8)
    fold = deal(labels, 3, seed=1)
    assert set(np.bincount(fold)) <= {32, 33}
    rare = labels[:, 4] == 1
    counts = np.bincount(fold[rare], minlength=3)
    assert counts.max() - counts.min() <= 1
    assert (deal(labels, 3, seed=1) == fold).all()
    assert (deal(labels, 3, seed=2) != fold).any()
    with pytest.raises(DataError, match="5 labeled images"):
        deal(labels[:5], 3, 0)


SETTINGS = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
}


def test_a_check_reads_no_hidden_and_no_test_labels(clip_folder, squares_folder, tmp_path):
    """The check also does not modify module and data."""
    source = Squares(squares_folder, train=40, test=7)
    found = []
    for lie in (False, True):
        data = tiny_data(source, labeled_fraction=0.5)
        data.prepare_data()
        data.setup("fit")
        if lie:
            data.train_table.labels[data.split.unlabeled] = 1 - data.train_table.labels[data.split.unlabeled]
            data.test_table.labels[:] = 1 - data.test_table.labels
        module = tiny_module(clip_folder)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        rows = data.split.labeled.copy()
        gain = GainCheck(2)(module, data, SETTINGS)
        assert all((before[k].nan_to_num() == v.nan_to_num()).all() for k, v in module.state_dict().items())
        assert (data.split.labeled == rows).all()
        assert not len(data.split.held_out)
        assert gain.images == 20
        assert np.nanmax(np.abs(gain.by_class[:, 0])) > 0
        found.append(gain)
    np.testing.assert_array_equal(found[0].by_class, found[1].by_class)
    assert np.isfinite(found[0].overall).all()

    found[0].save(tmp_path)
    with (tmp_path / "gain.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == [*CLASSES, "(mean)"]
    assert float(lines[-1]["gain"]) == pytest.approx(found[0].overall[0], abs=0.006)
    assert (tmp_path / "gain.png").stat().st_size > 5000


def test_each_fold_is_scored_by_both_networks(clip_folder, squares_folder, monkeypatch):
    """The gain compares the module with labeled-only training, and each labeled image is held out once."""
    seen = []

    def scores(module, data, settings):
        alone = isinstance(module.labeler, LabeledOnly)
        truth = data.train_table.labels[data.split.held_out].astype(np.int64)
        seen.append((alone, data.split.labeled, data.split.held_out, data.labeled_per_batch, data.warmup_batch_size))
        # The ranking is reversed with labels only, and correct with unlabeled images.
        return (1.0 - truth if alone else truth.astype(float)), truth

    monkeypatch.setattr(gain_module, "_held_out_scores", scores)
    data = tiny_data(Squares(squares_folder, train=40), labeled_fraction=0.5)
    data.setup("fit")
    gain = GainCheck(3)(tiny_module(clip_folder), data, SETTINGS)
    assert gain.overall[0] > 30
    assert not gain.hurts
    assert [alone for alone, *_ in seen] == [True, False] * 3
    held_out = [rows for _, _, rows, *_ in seen[::2]]
    assert sorted(np.concatenate(held_out).tolist()) == sorted(data.split.labeled.tolist())
    for _, labeled, rows, per_batch, warmup in seen:
        assert set(labeled) | set(rows) == set(data.split.labeled)
        assert not set(labeled) & set(rows)
        assert (per_batch, warmup) == (data.labeled_per_batch, data.warmup_batch_size)
    assert gain.trained_on == 13
    assert "13 of 20 labeled images" in gain.sentence()


def test_invalid_checks_are_refused(clip_folder, squares_folder):
    with pytest.raises(ConfigError, match="2 folds"):
        GainCheck(1)
    with pytest.raises(ConfigError, match="labeled images only"):
        GainCheck(2)(tiny_module(clip_folder, labeler=LabeledOnly()), tiny_data(Squares(squares_folder)), SETTINGS)
    with pytest.raises(ConfigError, match="max_epochs"):
        GainCheck(2)(tiny_module(clip_folder), tiny_data(Squares(squares_folder)), {**SETTINGS, "max_epochs": None})
    data = tiny_data(Squares(squares_folder), labeled_fraction=0.2)
    with pytest.raises(DataError, match="no class has 3"):
        GainCheck(2)(tiny_module(clip_folder), data, SETTINGS)
    data = tiny_data(Squares(squares_folder, train=40), labeled_fraction=0.5)
    with pytest.raises(ConfigError, match="reach max_epochs"):
        GainCheck(2)(tiny_module(clip_folder), data, {**SETTINGS, "max_steps": 2})
