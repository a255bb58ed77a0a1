"""Pseudo-labels of a run against those made by hand from the averaged weights and the weak views."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

from cbsa_lightning.context_task import ContextTask
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.metrics import pseudo_label_quality
from reference.contexts import targets as slow_context_targets
from reference.labelers import label, thresholds
from tiny_data import Squares, tiny_data, tiny_fit, tiny_module, tiny_trainer

SURE = 0.616  # the first epoch's confidences lie below, the second's above


class ByHand(L.Callback):
    """At the first step of each semi-supervised epoch, makes everything anew, one image at a time."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx or module.pseudo_labels is None:
            return
        data, rows = trainer.datamodule, trainer.datamodule.split.unlabelled
        truth = data.train_table.labels[data.split.labelled]
        module.eval()
        scores, contexts = [], []
        with torch.no_grad(), module.ema.applied_to(module.network):
            for one in data.weak_dataloader(trainer.current_epoch):
                for image in one.images:
                    output = module.network(module.network.features(image[None]))
                    scores.append(output.logits[0].sigmoid())
                    contexts.append(output.context_logits[0].softmax(0))
        module.train()
        scores = torch.stack(scores).numpy()
        expected = thresholds(scores, (truth == 1).sum(0), (truth >= 0).sum(0), "1", "0.998")
        self.epochs.append(
            {
                "tau": (module.tau_pos.numpy().copy(), module.tau_neg.numpy().copy()),
                "expected_tau": expected,
                "cut": module.cut.numpy().copy(),
                "expected_cut": thresholds(scores, (truth == 1).sum(0), (truth >= 0).sum(0), "1", "1")[0],
                "labels": module.pseudo_labels[rows].numpy(),
                "expected_labels": label(scores, *expected),
                "labelled_rows": module.pseudo_labels[data.split.labelled].numpy(),
                "contexts": module.context_targets[rows].clone(),
                "context_scores": torch.stack(contexts),
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
        contexts=ContextTask(confidence=SURE),
    )
    assert len(spy.epochs) == 2
    return module, spy.epochs


def test_thresholds_and_pseudo_labels(run):
    for epoch in run[1]:
        for ours, expected in zip(epoch["tau"], epoch["expected_tau"], strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        np.testing.assert_array_equal(epoch["labels"], epoch["expected_labels"])
        assert (epoch["labelled_rows"] == -1).all()
        assert {0, 1} <= set(epoch["labels"].ravel().tolist())


def test_predictions_are_cut_at_the_labelled_share(run):
    for epoch in run[1]:
        np.testing.assert_allclose(epoch["cut"], epoch["expected_cut"], atol=1e-5)
    assert run[0].decision_thresholds().tolist() == run[1][-1]["cut"].tolist()


def test_contexts_of_unlabelled_images(run):
    """Eq. 11: the weak view's context where it is surer than tau, else none."""
    counted = 0
    for epoch in run[1]:
        sure, context = epoch["context_scores"].max(1)
        for target, confidence, k in zip(epoch["contexts"], sure.tolist(), context.tolist(), strict=True):
            if abs(confidence - SURE) > 1e-5:
                expected = [float(confidence > SURE and j == k) for j in range(2)]
                assert target.tolist() == expected
                counted += confidence > SURE
    assert 0 < counted < 28


def test_measured_against_the_hidden_truth(run):
    for epoch in run[1]:
        quality = pseudo_label_quality(torch.from_numpy(epoch["expected_labels"]), epoch["hidden"])
        for name in ("precision", "recall", "CF1", "coverage"):
            assert float(epoch["logged"][f"pseudo/{name}"]) == pytest.approx(float(quality[name])), name
    last = run[1][-1]
    hidden = last["hidden"].numpy()
    # The accuracy is told under the partition that the head has learnt: the one of the epoch before.
    true = slow_context_targets(hidden, run[1][0]["partition"], 2, (hidden == 1).sum(0))
    found = last["context_scores"].argmax(1).numpy()
    assert float(last["logged"]["context/accuracy"]) == pytest.approx((found == true)[true >= 0].mean())


def test_loaders_alone_are_refused(tmp_path, clip_folder, squares_folder):
    data = tiny_data(Squares(squares_folder))
    data.setup("fit")
    with pytest.raises(ConfigError, match="datamodule=SSMLLDataModule"):
        tiny_trainer(tmp_path).fit(tiny_module(clip_folder), data.train_dataloader(), data.val_dataloader())
