"""Partly labeled squares and small networks for tests of the systems for partial labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbsa_lightning import SSMLLModule
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.label_masks import known_mask
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.losses import MeanBinaryCrossEntropy
from cbsa_lightning.networks.dsrb import DSRB
from cbsa_lightning.networks.gcn_ml import GCNML
from cbsa_lightning.networks.hst import HST
from cbsa_lightning.networks.sarb import SARB
from cbsa_lightning.networks.ssgrl import SSGRL
from cbsa_lightning.networks.sst import SST
from cbsa_lightning.networks.word_vectors import WordVectors
from reference.resnet import slope
from tiny_data import CLASSES, Squares

SMALL = {"backbone": "test_resnet.r160_in1k", "pretrained": "random"}

NARROW = {"dim": 8, "attention_width": 6}
SYSTEMS = {
    "SSGRL": partial(SSGRL, attention_width=8),
    "GCN-ML": partial(GCNML, hidden=8),
    "SST": partial(SST, start_epoch=1, bank=4, **NARROW),
    "SARB": partial(SARB, start_epoch=1, prototypes=3, every=1, samples=6, **NARROW),
    "DSRB": partial(DSRB, start_epoch=1, every=1, samples=6, **NARROW),
    "HST": partial(HST, start_epoch=1, prototypes=3, every=1, samples=6, **NARROW),
}


class TinyWords(WordVectors):
    """Word vectors with six fixed values per class."""

    def __init__(self, class_names):
        rng = np.random.default_rng(5)
        self.vectors = torch.from_numpy(rng.normal(size=(len(class_names), 6))).float()


class PartialSquares(Squares):
    """Squares of which a fraction of the labels is known; ``change`` modifies them further."""

    def __init__(self, folder: Path, share: float = 0.6, change: Any = None, **settings: Any) -> None:
        super().__init__(folder, **settings)
        labels = self._train.labels.copy()
        known = known_mask(*labels.shape, share, 0)
        known[np.arange(len(labels)), np.arange(len(labels)) % len(CLASSES)] = True  # at least one per image
        labels[~known] = -1
        if change is not None:
            change(labels)
        self._train = AnnotationTable(self._train.root, self._train.paths, labels, CLASSES)


def tiny_system(network: Any, **settings: Any) -> SSMLLModule:
    """Builds a module like the overlays of the partial systems; its weights depend only on these arguments."""
    torch.manual_seed(0)
    plain = {"labeler": LabeledOnly(), "loss": MeanBinaryCrossEntropy(), "warmup_epochs": 0, "ema_decay": 0.0}
    return SSMLLModule(CLASSES, partial(network, words=TinyWords, **SMALL), **{**plain, **settings})


def arrays(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def check_gradients(found, wanted, value):
    """Compares gradients of a weighted sum of ``found`` with respect to ``wanted`` with central differences."""
    weighing = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = torch.autograd.grad((found * weighing).sum(), list(wanted.values()))
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        expected = slope(lambda: (value() * weighing.numpy()).sum(), x.detach().numpy())
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-7, err_msg=name)
