"""The context partition of a run, and the contexts of labeled images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cbsa_lightning.callbacks.contexts import UpdateContexts
from cbsa_lightning.callbacks.thresholds import UpdateThresholds
from cbsa_lightning.method.context_task import ContextTask
from reference.contexts import best_cut, cooccurrence, normalized_cut, targets
from tiny_data import GROUPS, Squares, tiny_data


class Stub:
    """The parts of a module that the callback uses."""

    def __init__(self, num_contexts=2, **settings):
        self.num_contexts, self.class_names, self.device = num_contexts, list("abcde"), torch.device("cpu")
        self.contexts, self.stage = ContextTask(**settings), "semi-supervised"
        self.context_partition, self.context_targets = torch.full((5,), -1), None
        self.pseudo_labels, self.logged = None, {}

    def log(self, name, value):
        self.logged[name] = float(value)


@pytest.fixture
def data(squares_folder):
    data = tiny_data(Squares(squares_folder))
    data.setup("fit")
    return data


def test_first_partition_is_the_best_cut_of_the_labeled_images(data):
    module, labels = Stub(), data.labeled_targets().numpy()
    UpdateContexts(UpdateThresholds()).on_fit_start(SimpleNamespace(datamodule=data), module)
    found, matrix = module.context_partition.numpy(), cooccurrence(labels)
    assert normalized_cut(matrix, found) == pytest.approx(best_cut(matrix, 2))
    assert [set(found[list(group)]) for group in GROUPS] in ([{0}, {1}], [{1}, {0}])
    expected = targets(labels, found, 2, (labels == 1).sum(0))
    np.testing.assert_array_equal(module.context_targets[data.split.labeled].numpy(), np.eye(2)[expected])
    assert (module.context_targets[data.split.unlabeled] == 0).all()


def test_soft_targets_and_an_image_without_any_label(data):
    module = Stub(soft_targets=True)
    first = int(data.split.labeled[0])
    data.train_table.labels[first] = 0
    second = int(data.split.labeled[1])
    data.train_table.labels[second] = [1, 0, 1, 1, 0]
    module.context_partition = torch.tensor([0, 0, 1, 1, 1])
    UpdateContexts(UpdateThresholds()).on_fit_start(SimpleNamespace(datamodule=data), module)
    assert module.context_targets[first].tolist() == [0, 0]
    np.testing.assert_allclose(module.context_targets[second].numpy(), [1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("pseudo_weight", [1.0, 0.25])
def test_ids_match_the_previous_partition_and_pseudo_labels_are_counted(data, pseudo_weight):
    trainer, module = SimpleNamespace(datamodule=data), Stub(pseudo_weight=pseudo_weight)
    UpdateContexts(UpdateThresholds()).on_fit_start(trainer, module)
    before = module.context_partition.numpy().copy()
    module.context_partition = 1 - module.context_partition  # as if the head had learned other context ids
    pseudo = np.zeros((14, 5), dtype=np.int8)
    pseudo[:, [1, 2]] = 1  # classes 1 and 2 now occur together in all unlabeled images
    module.pseudo_labels = torch.full((22, 5), -1, dtype=torch.int8)
    module.pseudo_labels[data.split.unlabeled] = torch.from_numpy(pseudo)
    UpdateContexts(UpdateThresholds()).on_train_epoch_start(trainer, module)
    found = module.context_partition.numpy()
    weights = np.r_[np.ones(8), np.full(14, pseudo_weight)]
    matrix = cooccurrence(np.concatenate([data.labeled_targets().numpy(), pseudo]), weights)
    assert normalized_cut(matrix, found) == pytest.approx(best_cut(matrix, 2))
    assert (found == 1 - before).sum() >= 3, "ids swapped"
    assert module.logged["context/changed_classes"] == (found != 1 - before).sum()
    labels = data.labeled_targets().numpy()
    expected = np.eye(2)[targets(labels, found, 2, (labels == 1).sum(0))]
    np.testing.assert_array_equal(module.context_targets[data.split.labeled].numpy(), expected)


def test_weight_zero_and_the_warm_up_keep_the_labeled_partition(data):
    trainer = SimpleNamespace(datamodule=data)
    for module in (Stub(), Stub(pseudo_weight=1.0)):
        UpdateContexts(UpdateThresholds()).on_fit_start(trainer, module)
        before = module.context_partition.clone()
        module.stage = module.stage if module.contexts.pseudo_weight == 0 else "warm-up"
        module.pseudo_labels = torch.ones(22, 5, dtype=torch.int8)
        UpdateContexts(UpdateThresholds()).on_train_epoch_start(trainer, module)
        assert torch.equal(module.context_partition, before)
        assert module.logged == {}
