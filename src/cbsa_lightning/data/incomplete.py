"""Training images with unknown labels: the unlabeled ones, and those of which only some labels are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbsa_lightning.data.annotations import UNKNOWN
from cbsa_lightning.data.protocol import SemiSupervisedData

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class IncompleteImages:
    """Training images with at least one unknown label: those that pseudo-labels are made for.

    Attributes:
        unlabeled: ``(u,)`` rows of the train table of which training knows no label.
        partly: ``(p,)`` rows of labeled images with unknown entries.
        known: ``(p, C)`` labels of the latter in {1, 0, -1 unknown}.
    """

    unlabeled: Rows
    partly: Rows
    known: Tensor

    @classmethod
    def of(cls, data: SemiSupervisedData) -> IncompleteImages:
        """Those of a data module."""
        labels = data.labeled_targets()
        partly = (labels == UNKNOWN).any(1)
        return cls(data.split.unlabeled, data.split.labeled[partly.numpy()], labels[partly])

    @property
    def rows(self) -> Rows:
        """All rows ``(u + p,)``, the unlabeled images first."""
        return np.concatenate([self.unlabeled, self.partly]) if len(self.partly) else self.unlabeled

    def completed(self, scores: Tensor) -> Tensor:
        """Scores with 1 and 0 in the place of known labels.

        A labeler that takes a share of the highest scores then counts the known positives among them.

        Args:
            scores: ``(u + p, C)`` probabilities, in the order of :attr:`rows`.
        """
        if not len(self.partly):
            return scores
        u, known = len(self.unlabeled), self.known.to(scores.device)
        tail = torch.where(known == UNKNOWN, scores[u:], known.to(scores))
        return torch.cat([scores[:u], tail])

    def without_known(self, labels: Tensor) -> Tensor:
        """Labels ``(u + p, C)`` in the order of :attr:`rows`, -1 where the label is known."""
        if not len(self.partly):
            return labels
        u, known = len(self.unlabeled), self.known.to(labels.device)
        return torch.cat([labels[:u], torch.where(known == UNKNOWN, labels[u:], UNKNOWN).to(labels)])
