"""The recorded values of each class, compared with counts by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cbsa_lightning.callbacks.class_history import ClassHistory
from cbsa_lightning.reports.class_heat_maps import MEASURES

NAN = float("nan")
# Five images: 0 is labeled, 1 is labeled in part, 2 to 4 are unlabeled.
LABELED = torch.tensor([[1, 0, 0], [1, -1, -1]])
PSEUDO = torch.tensor([[-1, -1, -1], [1, 1, -1], [1, 1, 0], [1, -1, 0], [0, 0, -1]], dtype=torch.int8)
HIDDEN = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]])  # of 2, 3, 4 and 1, the order of IncompleteImages


def recorded(labels: torch.Tensor = PSEUDO, truth: torch.Tensor = HIDDEN, **changes) -> dict[int, torch.Tensor]:
    split = SimpleNamespace(labeled=np.array([0, 1]), unlabeled=np.array([2, 3, 4]))
    data = SimpleNamespace(split=split, labeled_targets=lambda: LABELED, hidden_targets=lambda: truth)
    module = SimpleNamespace(
        stage="semi-supervised", pseudo_labels=labels, tau_pos=torch.tensor([0.9, 0.8, torch.inf]),
        tau_neg=torch.tensor([0.1, 0.2, 0.3]), context_partition=torch.tensor([1, 0, -1]),
    )  # fmt: skip
    trainer = SimpleNamespace(datamodule=data, current_epoch=4, is_global_zero=True)
    for name, value in changes.items():
        setattr(module if hasattr(module, name) else trainer, name, value)
    history = ClassHistory()
    history.record(trainer, module)
    return history.epochs


@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
def test_values_of_an_epoch(kind):
    values = recorded(PSEUDO.to(kind))[4]
    found = dict(zip(MEASURES, values.tolist(), strict=True))
    expected = {
        "precision": [1 / 2, 1 / 2, NAN],  # images 2 and 3; images 2 and 1; no positive
        "recall": [1 / 2, 1.0, 0.0],
        "coverage": [1.0, 3 / 4, 2 / 4],  # class 0 of image 1 is known
        "positives": [2, 2, 0],
        "tau_pos": [0.9, 0.8, float("inf")],
        "tau_neg": [0.1, 0.2, 0.3],
        "context": [1, 0, NAN],
    }
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, nan_ok=True), name


def test_without_truth_precision_and_recall_are_unknown():
    values = recorded(truth=torch.full_like(HIDDEN, -1))[4]
    assert values[MEASURES.index("precision")].isnan().all()
    assert values[MEASURES.index("recall")].isnan().all()
    assert values[MEASURES.index("positives")].tolist() == [2, 2, 0]


@pytest.mark.parametrize(
    "changes", [{"stage": "warm-up"}, {"pseudo_labels": None}, {"is_global_zero": False}, {"datamodule": None}]
)
def test_nothing_is_recorded(changes):
    assert recorded(**changes) == {}
