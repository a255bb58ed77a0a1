"""Runs with fully labeled, partly labeled and unlabeled images."""

from __future__ import annotations

import csv
from math import comb

import lightning as L
import numpy as np
import pytest
import torch

from cbsa_lightning.callbacks.labels import WriteLabels
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.incomplete import IncompleteImages
from cbsa_lightning.data.label_masks import LabelMask
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.contexts import cooccurrence
from cbsa_lightning.method.labelers import ClassDistributionAware, LabeledOnly, positive_rates
from cbsa_lightning.method.losses import asymmetric_loss
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.training.loggers import RunLogger
from reference.contexts import targets
from reference.labelers import label, thresholds
from tiny_data import CLASSES, Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer

FULL, PARTLY = np.arange(8), np.arange(8, 24)  # rows of the 40 training images


class Joint(Squares):
    """Squares of which the first 8 are fully labeled, 16 are partly labeled, and the others are unlabeled.

    Args:
        hidden: Whether labels that training must not use are 1 - label instead of unknown.
        mask: Known entries; by default half of those of ``PARTLY``.
    """

    def __init__(self, folder, hidden=False, mask=None):
        super().__init__(folder, train=40)
        self.known = np.zeros((40, 5), dtype=bool) if mask is None else mask
        if mask is None:
            self.known[FULL] = True
            self.known[PARTLY] = np.random.default_rng(4).random((16, 5)) < 0.5
            self.known[PARTLY[0], 0], self.known[PARTLY[0], 1:] = True, False
        self.full = self._train
        labels = np.where(self.known, self.full.labels, -1).astype(np.int8)
        if hidden:
            labels = np.where(self.known, labels, 1 - self.full.labels).astype(np.int8)
        self._train = AnnotationTable(self.full.root, self.full.paths, labels, CLASSES)


class Spy(L.Callback):
    """Records the targets of the second stage at the first step of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx or module.stage != "semi-supervised":
            return
        images = IncompleteImages.of(trainer.datamodule)
        module.eval()
        scores = []
        with torch.no_grad(), module.ema.applied_to(module.network):
            for weak in trainer.datamodule.weak_dataloader(trainer.current_epoch):
                scores.append(module.network(module.network.features(weak.images)).logits.sigmoid())
        module.train()
        self.epochs.append(
            {
                "images": images,
                "scores": torch.cat(scores).numpy(),
                "table": module.pseudo_labels.clone(),
                "contexts": module.context_targets.clone() if module.num_contexts else None,
                "partition": module.context_partition.numpy().copy(),
            }
        )


def joint_fit(folder, clip_folder, squares_folder, source=None, **settings):
    data = {"labeled_fraction": None, "min_steps_per_epoch": 3, **settings.pop("data", {})}
    source = Joint(squares_folder) if source is None else source
    return tiny_fit(folder, clip_folder, source, data=data, max_epochs=settings.pop("max_epochs", 3), **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder, squares_folder):
    spy = Spy()
    module, trainer = joint_fit(
        tmp_path_factory.mktemp("joint"), clip_folder, squares_folder, trainer={"callbacks": [spy]}
    )
    assert len(spy.epochs) == 2
    return module, trainer, spy.epochs


def test_kinds_of_images_are_distinguished(squares_folder):
    data = tiny_data(Joint(squares_folder), labeled_fraction=None)
    data.setup("fit")
    images = IncompleteImages.of(data)
    partly = [row for row in PARTLY if 0 < data.train_table.labels[row].clip(-1, 0).sum() + 5 < 5]
    assert set(images.partly) == set(partly)
    assert set(data.split.labeled) >= {*FULL, *partly}
    assert [i for batch in data.weak_dataloader(0) for i in batch.index.tolist()] == images.rows.tolist()
    np.testing.assert_array_equal(images.known, data.train_table.labels[images.partly])


def test_unknown_entries_of_partly_labeled_images_get_pseudo_labels(run):
    source = run[1].datamodule.train_table.labels
    labeled = source[run[1].datamodule.split.labeled]
    for epoch in run[2]:
        images, scores = epoch["images"], epoch["scores"].copy()
        tail, known = scores[len(images.unlabeled) :], images.known.numpy()
        tail[known >= 0] = known[known >= 0]
        expected = label(scores, *thresholds(scores, (labeled == 1).sum(0), (labeled >= 0).sum(0), "1", "0.998"))
        found = epoch["table"][images.rows].numpy()
        np.testing.assert_array_equal(found, expected)
        assert (found[len(images.unlabeled) :][known < 0] >= 0).any()


def test_the_loss_uses_labels_for_known_entries_and_pseudo_labels_for_others(clip_folder, squares_folder, tmp_path):
    seen, made = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if module.stage == "semi-supervised":
                truth = torch.where(batch.targets >= 0, batch.targets, module.pseudo_labels[batch.index])
                seen.append((batch, made[-1], truth))

    def loss(logits, targets):
        made.append(targets.clone())
        return asymmetric_loss(logits, targets)

    joint_fit(tmp_path, clip_folder, squares_folder, trainer={"callbacks": [Watch()]}, loss=loss)
    assert seen
    for batch, used, expected in seen:
        assert torch.equal(used, expected)
        assert torch.equal(batch.targets[~batch.labeled], torch.full_like(batch.targets[~batch.labeled], -1))
    partly = torch.cat([used[batch.labeled & (batch.targets < 0).any(1)] for batch, used, _ in seen])
    assert len(partly) > 0


def test_training_does_not_use_hidden_entries(run, tmp_path, clip_folder, squares_folder):
    lied_to = Joint(squares_folder, hidden=True)
    mask = tmp_path / "mask.json"
    LabelMask.of(lied_to.train(), lied_to.known).save(mask)
    other, trainer = joint_fit(tmp_path, clip_folder, squares_folder, lied_to, data={"known_file": str(mask)})
    assert differences(run[0].state_dict(), other.state_dict()) == []
    images = IncompleteImages.of(trainer.datamodule)
    hidden = trainer.datamodule.hidden_targets().numpy()
    np.testing.assert_array_equal(hidden, lied_to.train().labels[images.rows])
    for name in ("precision", "recall"):
        assert 0 <= trainer.callback_metrics[f"pseudo/{name}"] <= 1


def test_coverage_counts_unknown_entries(run):
    images, table = run[2][-1]["images"], run[2][-1]["table"]
    known = np.concatenate([np.full((len(images.unlabeled), 5), -1), images.known.numpy()]) >= 0
    covered = (table[images.rows].numpy() >= 0)[~known].mean()
    assert run[1].callback_metrics["pseudo/coverage"].item() == pytest.approx(covered, abs=1e-6)


def test_contexts_use_known_positives(run):
    data, last = run[1].datamodule, run[2][-1]
    labels = data.labeled_targets().numpy()
    told = (labels == 1).any(1) | (labels >= 0).all(1)
    rates = (labels == 1).sum(0) / (labels >= 0).sum(0)
    expected = np.eye(2)[targets(labels[told], last["partition"], 2, rates)]
    np.testing.assert_array_equal(last["contexts"][data.split.labeled[told]].numpy(), expected)
    assert (~told).any(), "some have no known positive, and the weak view's context or none"


def test_a_resumed_run_is_bit_identical(run, tmp_path, clip_folder, squares_folder):
    saves = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = {"callbacks": [saves], "enable_checkpointing": True}
    joint_fit(tmp_path, clip_folder, squares_folder, trainer=trainer, max_epochs=3)
    again, _ = joint_fit(tmp_path, clip_folder, squares_folder, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert differences(run[0].state_dict(), again.state_dict()) == []


@pytest.mark.parametrize("cached", [False, True])
def test_soft_labels_of_partly_labeled_images_are_out_of_fold_probabilities(
    tmp_path, clip_folder, squares_folder, cached
):
    cache = FeatureCache(str(tmp_path / "cache"), strong_views=2) if cached else None
    module, trainer = joint_fit(
        tmp_path,
        clip_folder,
        squares_folder,
        labeler=StackedProbes(),
        stack_share=0.5,
        data={"feature_cache": cache},
    )
    data = trainer.datamodule
    images, table = IncompleteImages.of(data), module.pseudo_labels
    complete = np.setdiff1d(data.split.labeled, images.partly)
    assert (table[complete] == -1).all()
    assert ((table[images.rows] > 0) & (table[images.rows] < 1)).all()
    assert module.cut.isfinite().all()


@pytest.mark.parametrize("labeler", [ClassDistributionAware(), StackedProbes(), LabeledOnly()])
def test_partly_labeled_images_without_fully_labeled_ones(tmp_path, clip_folder, squares_folder, labeler):
    stack = {"stack_share": 0.5} if isinstance(labeler, StackedProbes) else {}
    source = Squares(squares_folder, train=40)
    data = {"known_fraction": 0.6, "seed": 2}
    module, trainer = joint_fit(tmp_path, clip_folder, squares_folder, source, data=data, labeler=labeler, **stack)
    assert len(trainer.datamodule.split.unlabeled) == 0
    assert trainer.datamodule.label_mask.fraction == 0.6
    assert module.cut.isfinite().all()
    assert all(value.isfinite().all() for value in module.network.parameters())
    assert (trainer.callback_metrics["train/loss_unsup"] > 0) == (not isinstance(labeler, LabeledOnly))


def test_labels_csv_keeps_known_labels(tmp_path, clip_folder, squares_folder):
    _, trainer = joint_fit(
        tmp_path,
        clip_folder,
        squares_folder,
        trainer={"callbacks": [WriteLabels()], "logger": RunLogger(str(tmp_path), name="run")},
    )
    data = trainer.datamodule
    images = IncompleteImages.of(data)
    with next(tmp_path.rglob("labels.csv")).open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(data.train_table.paths[images.rows])
    for row, known in zip(images.partly, images.known.numpy(), strict=True):
        written = rows[data.train_table.paths[row]]
        for k in np.flatnonzero(known >= 0):
            assert float(written[CLASSES[k]]) == known[k]
            assert (CLASSES[k] in written["labels"].split(";")) == bool(known[k])


def test_rates_from_known_entries_are_unbiased():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy((rng.random((60, 4)) < (0.5, 0.3, 0.15, 0.05)).astype(np.int8))
    truth = labels.double().mean(0)
    draws, negative = [], []
    for _ in range(3000):
        known = torch.from_numpy(rng.random((60, 4)) < 0.4)
        known[:6] = True  # some images are fully labeled
        draws.append(positive_rates(torch.where(known, labels, -1)))
        negative.append(positive_rates(torch.where(known, labels, 0)))
    # The fully labeled images are fixed, so the expectation combines their rate with that of the other images.
    found, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / len(draws) ** 0.5
    first, rest = labels[:6].double().sum(0), labels[6:].double().mean(0)
    expected = sum(_binomial(54, m, 0.4) * (first + m * rest) / (6 + m) for m in range(55))
    assert ((found - expected).abs() < 4.5 * error).all()
    assert ((torch.stack(negative).mean(0) - truth)[:2] < -0.1).all(), "unknown as absent halves the rates"


def test_rates_of_randomly_drawn_labeled_images_are_unbiased():
    rng = np.random.default_rng(1)
    labels = (rng.random((400, 3)) < (0.5, 0.2, 0.05)).astype(np.int8)
    draws = []
    for _ in range(3000):  # first draws fully labeled, partly labeled and unlabeled images, then known entries
        kind = rng.permutation(400)
        known = np.zeros(labels.shape, dtype=bool)
        known[kind[:20]] = True
        known[kind[20:100]] = rng.random((80, 3)) < 0.5
        draws.append(positive_rates(torch.from_numpy(np.where(known, labels, -1))).numpy())
    error = np.std(draws, axis=0) / len(draws) ** 0.5
    assert (np.abs(np.mean(draws, axis=0) - labels.mean(0)) < 4.5 * error).all()


def test_pseudo_labels_have_the_positive_rate_of_all_images():
    rng = np.random.default_rng(2)
    labels = (rng.random((600, 2)) < (0.4, 0.1)).astype(np.int8)
    scores = torch.from_numpy(np.clip(labels * 0.3 + 0.7 * rng.random(labels.shape), 0, 1)).float()
    counts = []
    for _ in range(300):
        known = rng.random(labels.shape) < 0.3
        partly = torch.from_numpy(np.where(known, labels, -1))
        images = IncompleteImages(np.arange(0), np.arange(600), partly)
        pseudo = ClassDistributionAware()(images.completed(scores), positive_rates(partly)).labels.numpy()
        counts.append([(pseudo[~known[:, k], k] == 1).sum() / (labels[~known[:, k], k] == 1).sum() for k in range(2)])
    assert np.abs(np.mean(counts, axis=0) - 1).max() < 0.03


def test_cooccurrence_of_known_entries_estimates_that_of_all():
    rng = np.random.default_rng(3)
    labels = torch.from_numpy((rng.random((4000, 4)) < (0.5, 0.3, 0.3, 0.2)).astype(np.int8))
    labels[:, 3] = labels[:, 2] & labels[:, 3]
    known = torch.from_numpy(rng.random(labels.shape) < (0.9, 0.3, 0.5, 0.5))
    found = cooccurrence(torch.where(known, labels, -1))
    np.testing.assert_allclose(found, cooccurrence(labels), atol=0.08)
    assert found[0, 1] > 2 * cooccurrence(torch.where(known, labels, 0))[0, 1]


def test_single_positive_labels(tmp_path, clip_folder, squares_folder):
    full = Squares(squares_folder, train=40).train().labels
    one = np.zeros((40, 5), dtype=bool)
    for row in range(30):
        one[row, np.random.default_rng(row).choice(np.flatnonzero(full[row]))] = True
    with pytest.warns(UserWarning, match="5 of 5 classes have known positives but no known negative"):
        module, trainer = joint_fit(tmp_path, clip_folder, squares_folder, Joint(squares_folder, mask=one))
    labels = trainer.datamodule.labeled_targets().numpy()
    assert labels.shape == (30, 5)
    assert (labels.sum(1) == 1).all()
    np.testing.assert_allclose(module.positive_rate, one.sum(0) / 30, rtol=1e-6)
    assert module.cut.isfinite().all()


def test_a_class_without_known_labels(tmp_path, clip_folder, squares_folder):
    known = Joint(squares_folder).known
    known[:, 4] = False
    module, _ = joint_fit(tmp_path, clip_folder, squares_folder, Joint(squares_folder, mask=known))
    assert module.positive_rate[4] == 0
    assert not (module.pseudo_labels[:, 4] == 1).any()
    assert all(value.isfinite().all() for value in module.network.parameters())


def test_missing_known_labels_are_refused(squares_folder):
    data = tiny_data(Joint(squares_folder, mask=np.zeros((40, 5), dtype=bool)), labeled_fraction=None)
    with pytest.raises(DataError, match="are unlabeled"):
        data.setup("fit")


def test_a_data_module_without_partly_labeled_images_is_refused(tmp_path, clip_folder, squares_folder):
    data = tiny_data(Joint(squares_folder), labeled_fraction=None)
    data.setup("fit")
    partly = IncompleteImages.of(data).partly
    plain = data.weak_dataloader

    def forgetful(epoch):
        return (batch for batch in plain(epoch) if not np.isin(batch.index, partly).any())

    data.eval_batch_size = 1
    data.weak_dataloader = forgetful
    with pytest.raises(ConfigError, match=r"gave no view of \d+ training images with unknown labels: train/"):
        tiny_trainer(tmp_path).fit(tiny_module(clip_folder), datamodule=data)


def _binomial(n, k, p):
    return comb(n, k) * p**k * (1 - p) ** (n - k)
