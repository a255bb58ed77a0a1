"""Complete runs with a labeler that computes pseudo-labels once, before training."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.method.labelers import Evidence
from cbsa_lightning.method.metrics import pseudo_label_quality
from cbsa_lightning.method.stacking import StackedProbes
from tiny_data import Squares, differences, tiny_data, tiny_fit, tiny_module

TRAIN = 40  # 16 labeled


class Tables(L.Callback):
    """Records the pseudo-labels at the first step of each epoch, and the metrics at its end."""

    def __init__(self):
        self.epochs = []
        self.logged = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.epochs.append(module.pseudo_labels.clone())

    def on_train_epoch_end(self, trainer, module):
        self.logged.append(dict(trainer.callback_metrics))


def fit(folder, clip_folder, squares_folder, **settings):
    source = Squares(squares_folder, train=TRAIN, hidden=settings.pop("hidden", ()))
    return tiny_fit(folder, clip_folder, source, labeler=StackedProbes(), max_epochs=3, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder, squares_folder):
    folder, spy = tmp_path_factory.mktemp("once"), Tables()
    saves = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = {"callbacks": [spy, saves], "enable_checkpointing": True}
    module, _ = fit(folder, clip_folder, squares_folder, trainer=trainer)
    return module, spy, folder


def by_hand(clip_folder, squares_folder, kept_as=torch.float32):
    """Computes the evidence of an untrained network image by image."""
    data = tiny_data(Squares(squares_folder, train=TRAIN))
    data.setup("fit")
    network = tiny_module(clip_folder).network
    describe = network.describer()
    order = np.concatenate([data.split.labeled, data.split.unlabeled])
    batches = [batch for row in order for batch in data.plain_dataloader([row])]
    found = [describe(network.features(batch.images).to(kept_as).float()) for batch in batches]
    return data, Evidence(
        [torch.cat(parts) for parts in zip(*(f.descriptors for f in found), strict=True)],
        [torch.cat(parts) for parts in zip(*(f.scores for f in found), strict=True)],
        torch.arange(len(data.split.labeled)),
        data.labeled_targets(),
    )


def test_labels_come_from_the_untrained_towers(run, clip_folder, squares_folder):
    module, spy, _ = run
    data, evidence = by_hand(clip_folder, squares_folder)
    expected = StackedProbes()(evidence)
    assert len(evidence.descriptors) == 2
    assert len(evidence.scores) == 1
    torch.testing.assert_close(module.pseudo_labels[data.split.unlabeled].float(), expected, atol=2e-3, rtol=0)
    assert (module.pseudo_labels[data.split.labeled] == -1).all()
    assert expected.std() > 0.05
    for table in spy.epochs:
        assert torch.equal(table, module.pseudo_labels)
    assert module.pseudo_labels.dtype == torch.float16


def test_quality_is_logged_and_the_network_sets_the_thresholds(run, squares_folder):
    module, spy, _ = run
    data = tiny_data(Squares(squares_folder, train=TRAIN))
    data.setup("fit")
    hard = (module.pseudo_labels[data.split.unlabeled] >= 0.5).to(torch.int8)
    quality = pseudo_label_quality(hard, data.hidden_targets())
    assert float(spy.logged[-1]["pseudo/precision"]) == pytest.approx(float(quality["precision"]))
    assert float(spy.logged[-1]["pseudo/coverage"]) == 1
    assert module.cut.isfinite().any()
    assert module.tau_pos.isnan().all()
    assert float(spy.logged[-1]["train/loss_unsup"]) > 0


def test_training_does_not_use_hidden_labels(run, tmp_path, clip_folder, squares_folder):
    data = tiny_data(Squares(squares_folder, train=TRAIN))
    data.setup("fit")
    lied_to, _ = fit(tmp_path, clip_folder, squares_folder, hidden=data.split.unlabeled)
    assert differences(run[0].state_dict(), lied_to.state_dict()) == []


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_keeps_its_labels(run, tmp_path, clip_folder, squares_folder, epoch):
    """The checkpoint stores the labels because they cannot be recomputed: training changes the attention pool."""
    module, _, folder = run
    resumed, _ = fit(tmp_path, clip_folder, squares_folder, ckpt_path=str(folder / f"epoch={epoch}.ckpt"))
    assert torch.equal(resumed.pseudo_labels, module.pseudo_labels)
    assert differences(module.state_dict(), resumed.state_dict()) == []


def test_labels_of_another_labeler_are_not_reused(run, tmp_path, clip_folder, squares_folder):
    """If the earlier run used thresholds, whose labels are integers, the labels are computed again."""
    source = Squares(squares_folder, train=TRAIN)
    saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    settings = {"callbacks": [saver], "enable_checkpointing": True}
    before, _ = tiny_fit(tmp_path, clip_folder, source, max_epochs=3, trainer=settings)
    assert before.pseudo_labels.dtype == torch.int8
    resumed, _ = fit(tmp_path, clip_folder, squares_folder, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    labels = resumed.pseudo_labels[resumed.pseudo_labels >= 0]
    assert labels.dtype == torch.float16
    assert ((labels > 0) & (labels < 1)).all()


def test_cached_features_give_the_labels_of_half_precision(tmp_path, clip_folder, squares_folder):
    """The features of this random tower differ by little more than the precision of float16, so the labels change."""
    cache = FeatureCache(str(tmp_path / "cache"))
    module, _ = fit(tmp_path, clip_folder, squares_folder, data={"feature_cache": cache})
    data, evidence = by_hand(clip_folder, squares_folder, kept_as=torch.float16)
    found = module.pseudo_labels[data.split.unlabeled].float()
    torch.testing.assert_close(found, StackedProbes()(evidence), atol=0.1, rtol=0)  # rounding depends on the batch size
