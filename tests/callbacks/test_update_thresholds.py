"""Compares the pseudo-labels of a run with those computed manually from the averaged weights and the weak views."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from cbsa_lightning.callbacks.thresholds import UpdateThresholds
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.labelers import ClassDistributionAware
from cbsa_lightning.method.metrics import pseudo_label_quality
from reference.contexts import targets as slow_context_targets
from reference.labelers import label, thresholds
from tiny_data import Squares, tiny_data, tiny_fit, tiny_module, tiny_trainer

SURE = 0.55  # below all confidences of the run


def scores_by_hand(module, data, epoch):
    """Computes class and context scores of the weak views of an epoch with the averaged weights, image by image."""
    module.eval()
    scores, contexts = [], []
    with torch.no_grad(), module.ema.applied_to(module.network):
        for batch in data.weak_dataloader(epoch):
            for image in batch.images:
                output = module.network(module.network.features(image[None]))
                scores.append(output.logits[0].sigmoid())
                contexts.append(output.context_logits[0].softmax(0))
    module.train()
    return torch.stack(scores).numpy(), torch.stack(contexts)


def cut_by_hand(module, data, epoch):
    """Returns the score of each class above which its labeled fraction of the unlabeled images is."""
    truth = data.train_table.labels[data.split.labeled]
    scores, _ = scores_by_hand(module, data, epoch)
    return thresholds(scores, (truth == 1).sum(0), (truth >= 0).sum(0), "1", "1")[0]


class ByHand(L.Callback):
    """Recomputes all results image by image, at the first step of each epoch of the second stage."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx or module.pseudo_labels is None:
            return
        data, rows = trainer.datamodule, trainer.datamodule.split.unlabeled
        truth = data.train_table.labels[data.split.labeled]
        scores, contexts = scores_by_hand(module, data, trainer.current_epoch)
        expected = thresholds(scores, (truth == 1).sum(0), (truth >= 0).sum(0), "1", "0.998")
        self.epochs.append(
            {
                "tau": (module.tau_pos.numpy().copy(), module.tau_neg.numpy().copy()),
                "expected_tau": expected,
                "cut": module.cut.numpy().copy(),
                "expected_cut": thresholds(scores, (truth == 1).sum(0), (truth >= 0).sum(0), "1", "1")[0],
                "labels": module.pseudo_labels[rows].numpy(),
                "expected_labels": label(scores, *expected),
                "scores": scores,
                "labeled_rows": module.pseudo_labels[data.split.labeled].numpy(),
                "contexts": module.context_targets[rows].clone(),
                "context_scores": contexts,
                "partition": module.context_partition.numpy().copy(),
                "hidden": data.hidden_targets(),
            }
        )

    def on_train_epoch_end(self, trainer, module):
        if module.pseudo_labels is not None:
            self.epochs[-1]["logged"] = dict(trainer.callback_metrics)


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder, squares_folder):
    spy = ByHand()
    module, _ = tiny_fit(
        tmp_path_factory.mktemp("run"),
        clip_folder,
        Squares(squares_folder),
        max_epochs=3,
        data={"eval_batch_size": 5},
        trainer={"callbacks": [spy]},
        contexts=ContextTask(confidence=SURE, pseudo_weight=1.0),
    )
    assert len(spy.epochs) == 2
    return module, spy.epochs


def test_thresholds_and_pseudo_labels(run):
    for epoch in run[1]:
        for ours, expected in zip(epoch["tau"], epoch["expected_tau"], strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        labels, expected = epoch["labels"], epoch["expected_labels"]
        for value in (1, 0):
            np.testing.assert_array_equal((labels == value).sum(0), (expected == value).sum(0))
        # Scores of a batch and of single images differ by rounding, which may exchange two images at a threshold.
        at_a_threshold = np.isclose(epoch["scores"][..., None], np.stack(epoch["expected_tau"], -1), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(*(np.where(at_a_threshold.any(-1), -2, x) for x in (labels, expected)))
        assert (epoch["labeled_rows"] == -1).all()
        assert {0, 1} <= set(epoch["labels"].ravel().tolist())


def test_predictions_have_the_labeled_positive_rate(run):
    for epoch in run[1]:
        np.testing.assert_allclose(epoch["cut"], epoch["expected_cut"], atol=1e-5)


STOPPED = {
    "epochs": {},
    "steps within an epoch": {"max_steps": 4},
    "time": {"max_time": {"seconds": 0}, "min_steps": 4, "max_epochs": 99},
    "validation every second epoch": {"check_val_every_n_epoch": 2},
    "early stopping": {"max_epochs": 99},
}


@pytest.mark.parametrize("reason", STOPPED)
def test_thresholds_are_those_of_the_final_weights(tmp_path, clip_folder, squares_folder, reason):
    last = ModelCheckpoint(tmp_path, save_last=True)
    stop = [EarlyStopping("train/loss", divergence_threshold=0.0)] if reason == "early stopping" else []
    settings = {"max_epochs": 2, **STOPPED[reason], "callbacks": [*stop, last], "enable_checkpointing": True}
    epochs = settings.pop("max_epochs")
    module, trainer = tiny_fit(
        tmp_path, clip_folder, Squares(squares_folder), max_epochs=epochs, trainer=settings, warmup_epochs=0
    )
    assert trainer.global_step < 20
    saved = read_checkpoint(last.last_model_path, ("state_dict",))["state_dict"]["cut"]
    assert saved.tolist() == module.cut.tolist()
    # The weak views are those of the next epoch.
    epoch = 2 if reason in ("epochs", "validation every second epoch") else trainer.current_epoch
    np.testing.assert_allclose(module.cut, cut_by_hand(module, trainer.datamodule, epoch), atol=1e-5)


def test_scores_of_an_epoch_are_computed_once(tmp_path, clip_folder, squares_folder, monkeypatch):
    passes = []
    score = UpdateThresholds._score
    monkeypatch.setattr(UpdateThresholds, "_score", lambda *args: passes.append(args[-1]) or score(*args))
    tiny_fit(tmp_path, clip_folder, Squares(squares_folder), max_epochs=4)
    assert passes == [1, 2, 3, 4]  # the last pass is for the final weights


class Unlabeled(Squares):
    """Squares with unknown labels of the last 12 training images."""

    def train(self):
        table = super().train()
        labels = table.labels.copy()
        labels[10:] = -1
        return AnnotationTable(table.root, table.paths, labels, table.class_names)


def test_coverage_is_logged_if_the_truth_is_unknown(tmp_path, clip_folder, squares_folder):
    _, trainer = tiny_fit(
        tmp_path,
        clip_folder,
        Unlabeled(squares_folder),
        data={"labeled_fraction": None},
        labeler=ClassDistributionAware(eta_neg=0.5),
    )
    assert 0.3 < trainer.callback_metrics["pseudo/coverage"] < 1
    assert "pseudo/precision" not in trainer.callback_metrics


def test_contexts_of_unlabeled_images(run):
    """Tests Eq. 11: the context of the weak view, since its confidence is above tau."""
    for epoch in run[1]:
        sure, context = epoch["context_scores"].max(1)
        assert sure.min() > SURE
        assert torch.equal(epoch["contexts"], torch.nn.functional.one_hot(context, 2).float())


def test_unlabeled_images_have_no_context_below_the_confidence(tmp_path, clip_folder, squares_folder):
    spy = ByHand()
    contexts = ContextTask(confidence=0.99, pseudo_weight=1.0)
    tiny_fit(
        tmp_path, clip_folder, Squares(squares_folder), max_epochs=2, trainer={"callbacks": [spy]}, contexts=contexts
    )
    (epoch,) = spy.epochs
    assert epoch["context_scores"].max() < 0.99
    assert epoch["contexts"].shape == (14, 2)
    assert not epoch["contexts"].any()


def test_pseudo_labels_are_compared_with_the_hidden_truth(run):
    for epoch in run[1]:
        quality = pseudo_label_quality(torch.from_numpy(epoch["expected_labels"]), epoch["hidden"])
        for name in ("precision", "recall", "CF1", "coverage"):
            assert float(epoch["logged"][f"pseudo/{name}"]) == pytest.approx(float(quality[name])), name
    last = run[1][-1]
    hidden = last["hidden"].numpy()
    # The accuracy refers to the partition that the head has learned, which is that of the previous epoch.
    true = slow_context_targets(hidden, run[1][0]["partition"], 2, (hidden == 1).sum(0))
    found = last["context_scores"].argmax(1).numpy()
    assert float(last["logged"]["context/accuracy"]) == pytest.approx((found == true)[true >= 0].mean())


def test_loaders_without_a_data_module_are_refused(tmp_path, clip_folder, squares_folder):
    data = tiny_data(Squares(squares_folder))
    data.setup("fit")
    with pytest.raises(ConfigError, match="datamodule=SSMLLDataModule"):
        tiny_trainer(tmp_path).fit(tiny_module(clip_folder), data.train_dataloader(), data.val_dataloader())
