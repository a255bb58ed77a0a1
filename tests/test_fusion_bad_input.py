"""Fused scores are defined for degenerate labels and features."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import DataError
from cbsa_lightning.method.decisions import F1, Precision, Recall, Share
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.method.labelers import Evidence, LabeledOnly, class_thresholds, positive_rates
from cbsa_lightning.method.stacking import StackedProbes
from tiny_data import CLASSES, Squares, tiny_fit


class Relabeled(Squares):
    """The same images with changed labels."""

    def __init__(self, folder, change) -> None:
        super().__init__(folder)
        labels = self._train.labels.copy()
        change(labels)
        self._train = AnnotationTable(self._train.root, self._train.paths, labels, CLASSES)


def no_positive(labels):
    labels[:, 1] = 0


def always_present(labels):
    labels[:, 1] = 1


def unknown_class(labels):
    labels[:, 1] = -1


def unknown_entries(labels):
    labels[::2, :3] = -1


def fused_fit(folder, clip, source, objective=None, **settings):
    fused = {"labeler": StackedProbes(), "stack_share": 0.5, "objective": objective}
    settings.setdefault("trainer", {}).update(callbacks=[RunReport(num_images=1)], default_root_dir=folder)
    return tiny_fit(folder, clip, source, **fused, **settings)


@pytest.mark.parametrize("objective", [Share(), F1(), Precision(0.8), Recall(0.8)])
@pytest.mark.parametrize("change", [no_positive, always_present, unknown_class, unknown_entries])
def test_scores_and_thresholds_are_defined_for_degenerate_labels(
    tmp_path, monkeypatch, clip_folder, squares_folder, change, objective
):
    monkeypatch.chdir(tmp_path)
    if not isinstance(objective, Share):  # the plots do not depend on the objective
        monkeypatch.setattr(RunReport, "_pictures", lambda *_: iter(()))
    module, trainer = fused_fit(tmp_path, clip_folder, Relabeled(squares_folder, change), objective)
    images = torch.cat([batch.images for batch in trainer.datamodule.val_dataloader()])
    scores = module.eval()(images)
    assert scores.isfinite().all()
    assert ((scores > 0) & (scores < 1)).all()
    assert not module.decision_thresholds().isnan().any()
    (file,) = tmp_path.rglob("thresholds.csv")
    with file.open() as lines:
        assert [row["class"] for row in csv.DictReader(lines)] == list(CLASSES)


def test_one_labeled_image_is_refused(tmp_path, monkeypatch, clip_folder, squares_folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="at least two labeled images"):
        fused_fit(tmp_path, clip_folder, Squares(squares_folder), data={"labeled_fraction": 0.05})


def test_fusion_without_unlabeled_images_is_refused(tmp_path, monkeypatch, clip_folder, squares_folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no unlabeled images.*LabeledOnly"):
        fused_fit(tmp_path, clip_folder, Squares(squares_folder), data={"labeled_fraction": 1.0})


def test_labeled_only_training_computes_thresholds_from_validation_scores(tmp_path, clip_folder, squares_folder):
    settings = {"labeler": LabeledOnly(), "data": {"labeled_fraction": 1.0}}
    module, trainer = tiny_fit(tmp_path, clip_folder, Squares(squares_folder), **settings)
    data = trainer.datamodule
    module.eval()
    scores = torch.cat([module(batch.images) for batch in data.val_dataloader()])
    expected = class_thresholds(scores, positive_rates(data.labeled_targets()), 1.0, 0.0)[0]
    torch.testing.assert_close(module.decision_thresholds(), expected)


def test_constant_features_give_equal_scores():
    labels = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 1, 0]], dtype=np.int8)
    evidence = Evidence([torch.ones(7, 3)], [torch.ones(7, 5)], torch.arange(2), torch.from_numpy(labels))
    fusion = Fusion.of(StackedProbes().fit(evidence), np.ones((5, 5)), labels, 0.5)
    logits = fusion.adapted(torch.zeros(4, 5)).fused(torch.zeros(4, 5), torch.zeros(4, 5))
    assert logits.isfinite().all()
    assert (logits == logits[:1]).all()
