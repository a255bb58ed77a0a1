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
    """Training images with unknown labels, which receive pseudo-labels.

    Attributes:
        unlabeled: ``(u,)`` rows of the training table that have no known labels.
        partly: ``(p,)`` rows of labeled images that have unknown labels.
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
        """Replaces the scores of known labels by 1 and 0.

        If a labeler selects a fraction of the highest scores, this fraction then includes the known positives.

        Args:
            scores: ``(u + p, C)`` probabilities, in the order of :attr:`rows`.
        """
        if not len(self.partly):
            return scores
        u, known = len(self.unlabeled), self.known.to(scores.device)
        tail = torch.where(known == UNKNOWN, scores[u:], known.to(scores))
        return torch.cat([scores[:u], tail])

    def without_known(self, labels: Tensor) -> Tensor:
        """Returns labels ``(u + p, C)`` in the order of :attr:`rows`, in which known labels are replaced by -1."""
        if not len(self.partly):
            return labels
        u, known = len(self.unlabeled), self.known.to(labels.device)
        return torch.cat([labels[:u], torch.where(known == UNKNOWN, labels[u:], UNKNOWN).to(labels)])
