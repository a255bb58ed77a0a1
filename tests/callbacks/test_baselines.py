"""Baselines of --compare are fitted to the labeled images only and evaluated on the validation images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from cbsa_lightning.callbacks.baselines import MeasureBaselines
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.method.labelers import Evidence, LabeledOnly
from cbsa_lightning.method.linear_probe import LinearProbe
from cbsa_lightning.method.stacking import StackedProbes
from tiny_data import Squares, tiny_data, tiny_fit, tiny_module


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


def described(module, loader):
    parts = []
    for batch in loader:
        found = module.network.describer()(module.network.features(batch.images))
        parts.append([*found.descriptors, *found.scores])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def expected(clip, squares):
    """Computes the same metrics image by image, without a Trainer."""
    module, data = tiny_module(clip), tiny_data(squares)
    data.setup("fit")
    rows = np.concatenate([data.split.labeled, data.split.unlabeled])
    known = described(module, data.plain_dataloader(rows))
    new = described(module, data.val_dataloader())
    labels = data.labeled_targets()
    evidence = Evidence(known[:2], known[2:], torch.arange(len(labels)), labels)
    inputs = [part.numpy() for part in new]
    truth = data.eval_table().labels
    return {
        "zero-shot": average_precision_score(truth, inputs[-1], average="macro"),
        "linear probe": average_precision_score(truth, LinearProbe().fit(evidence).logits(inputs), average="macro"),
        "stacked probes": average_precision_score(truth, StackedProbes().fit(evidence).logits(inputs), average="macro"),
    }


@pytest.mark.parametrize("cached", [False, True])
def test_results_equal_those_of_the_classifiers(tmp_path, clip_folder, squares, cached):
    baselines = MeasureBaselines()
    data = {"feature_cache": FeatureCache(str(tmp_path / "cache"))} if cached else {}
    tiny_fit(tmp_path, clip_folder, squares, data=data, trainer={"callbacks": [baselines]})
    tolerance = 0.1 if cached else 1e-6  # cached float16 features can change the ranking of seven images
    assert baselines.results == pytest.approx(expected(clip_folder, squares), abs=tolerance)


def test_a_resumed_run_restores_the_baselines_from_its_checkpoint(tmp_path, clip_folder, squares):
    first, second = MeasureBaselines(), MeasureBaselines()
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, trainer={"callbacks": [first], "max_steps": 3})
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    tiny_fit(tmp_path, clip_folder, squares, trainer={"callbacks": [second]}, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert second.results == first.results != {}


def test_training_does_not_depend_on_the_baselines(tmp_path, clip_folder, squares):
    plain, _ = tiny_fit(tmp_path, clip_folder, squares)
    measured, _ = tiny_fit(tmp_path, clip_folder, squares, trainer={"callbacks": [MeasureBaselines()]})
    for ours, theirs in zip(measured.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_labeled_only_run_describes_no_unlabeled_images(tmp_path, clip_folder, squares):
    baselines = MeasureBaselines()
    data = {"feature_cache": FeatureCache(str(tmp_path / "cache"))}
    settings = {"labeler": LabeledOnly(), "trainer": {"callbacks": [baselines]}, "data": data}
    tiny_fit(tmp_path, clip_folder, squares, **settings)
    assert baselines.results.keys() == {"zero-shot", "linear probe", "stacked probes"}
