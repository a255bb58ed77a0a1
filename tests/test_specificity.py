"""Metrics that show whether the decoder computes label-specific image features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from cbsa_lightning.method.metrics import mean_pairwise_cosine
from cbsa_lightning.method.specificity import Specificity
from tiny_data import Squares, tiny_data, tiny_module, tiny_trainer


def test_mean_pairwise_cosine_equals_a_loop_over_pairs():
    features = torch.randn(3, 5, 7, generator=torch.manual_seed(0))
    expected = [
        np.mean([float(torch.cosine_similarity(f[i], f[j], 0)) for i in range(5) for j in range(5) if i != j])
        for f in features
    ]
    np.testing.assert_allclose(mean_pairwise_cosine(features), expected, atol=1e-6)


def test_identical_features_have_cosine_one_and_a_single_label_has_none():
    shared = torch.randn(2, 1, 7, generator=torch.manual_seed(0))
    np.testing.assert_allclose(mean_pairwise_cosine(shared.expand(-1, 4, -1)), 1, atol=1e-6)
    assert mean_pairwise_cosine(shared).isnan().all()


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


def test_validation_logs_the_gain_over_the_mean_feature(tmp_path, clip_folder, squares):
    data = tiny_data(squares)
    module = tiny_module(clip_folder)
    trainer = tiny_trainer(tmp_path)
    trainer.validate(module, datamodule=data, verbose=False)
    module.eval()
    truth, ours, shared, cosines = [], [], [], []
    with torch.no_grad():
        text = module.network.encode_text()
        for batch in data.val_dataloader():
            z = module.network(module.features_of(batch), text).label_features
            for f in z:
                ours.append([float(module.network._cosine(f[k][None, None], text.target)[0, k]) for k in range(len(f))])
                shared.append(module.network._cosine(f.mean(0)[None, None], text.target)[0].tolist())
                cosines += [float(torch.cosine_similarity(f[i], f[j], 0)) for i in range(len(f)) for j in range(i)]
            truth += batch.targets.tolist()
    truth, ours, shared = np.array(truth), np.array(ours), np.array(shared)
    used = [k for k in range(truth.shape[1]) if (truth[:, k] == 1).any()]
    gains = [
        average_precision_score(truth[:, k] == 1, ours[:, k]) - average_precision_score(truth[:, k] == 1, shared[:, k])
        for k in used
    ]
    metrics = trainer.callback_metrics
    assert float(metrics["val/specific_gain"]) == pytest.approx(np.mean(gains), abs=1e-5)
    assert float(metrics["val/feature_cosine"]) == pytest.approx(np.mean(cosines), abs=1e-5)


def filled(label_features, mean_logits, targets):
    specificity = Specificity(targets.shape[1])
    specificity.update(label_features, mean_logits, targets)
    return specificity


def test_a_collapsed_decoder_is_reported_once():
    targets = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.int8)
    shared = torch.randn(2, 1, 7, generator=torch.manual_seed(0)).expand(-1, 3, -1)
    specificity = filled(shared, 2.0 * targets - 1, targets)
    figures = specificity.compute(torch.tensor(1.0))
    assert figures == {"specific_gain": 0.0, "feature_cosine": pytest.approx(1.0, abs=1e-6)}
    with pytest.warns(
        UserWarning, match=r"mean cosine of 1.0000, and replacing them .* changes mAP by [+-]0.00 points"
    ):
        specificity.warn_if_collapsed(figures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specificity.warn_if_collapsed(figures)


@pytest.mark.parametrize(("gain", "cosine"), [(0.02, 0.999), (0.0, 0.9), (float("nan"), 0.999), (0.0, float("nan"))])
def test_useful_or_distinct_features_are_not_reported(gain, cosine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Specificity(3).warn_if_collapsed({"specific_gain": torch.tensor(gain), "feature_cosine": torch.tensor(cosine)})


def test_reset_discards_the_pass():
    targets = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.int8)
    features = torch.randn(2, 3, 7, generator=torch.manual_seed(0))
    specificity = filled(features, 2.0 * targets - 1, targets)
    specificity.reset()
    specificity.update(features.flip(1), 1 - 2.0 * targets, targets)
    again = filled(features.flip(1), 1 - 2.0 * targets, targets)
    one, other = (s.compute(torch.tensor(1.0)) for s in (specificity, again))
    assert one == other
    assert one["specific_gain"] > 0
