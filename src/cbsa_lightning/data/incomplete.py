"""Training images with unknown labels: unlabeled and partly labeled images."""

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
    """Training images with at least one unknown label, which receive pseudo-labels.

    Attributes:
        unlabeled: ``(u,)`` rows of the training table without any known label.
        partly: ``(p,)`` rows of labeled images with unknown entries.
        known: ``(p, C)`` labels of the partly labeled images in {1, 0, -1 unknown}.
    """

    unlabeled: Rows
    partly: Rows
    known: Tensor

    @classmethod
    def of(cls, data: SemiSupervisedData) -> IncompleteImages:
        """Collects the incomplete images of a data module."""
        labels = data.labeled_targets()
        partly = (labels == UNKNOWN).any(1)
        return cls(data.split.unlabeled, data.split.labeled[partly.numpy()], labels[partly])

    @property
    def rows(self) -> Rows:
        """All rows ``(u + p,)``, unlabeled images first."""
        return np.concatenate([self.unlabeled, self.partly]) if len(self.partly) else self.unlabeled

    def completed(self, scores: Tensor) -> Tensor:
        """Returns the scores with 1 and 0 for known labels.

        A labeler that selects a fraction of the highest scores therefore includes the known positives in it.

        Args:
            scores: ``(u + p, C)`` probabilities, in the order of :attr:`rows`.
        """
        if not len(self.partly):
            return scores
        u, known = len(self.unlabeled), self.known.to(scores.device)
        tail = torch.where(known == UNKNOWN, scores[u:], known.to(scores))
        return torch.cat([scores[:u], tail])

    def without_known(self, labels: Tensor) -> Tensor:
        """Returns labels ``(u + p, C)`` in the order of :attr:`rows`, -1 for known labels."""
        if not len(self.partly):
            return labels
        u, known = len(self.unlabeled), self.known.to(labels.device)
        return torch.cat([labels[:u], torch.where(known == UNKNOWN, labels[u:], UNKNOWN).to(labels)])
