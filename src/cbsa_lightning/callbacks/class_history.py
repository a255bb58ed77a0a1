"""Pseudo-labels, thresholds and context of each class in each epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbsa_lightning.data.incomplete import IncompleteImages
from cbsa_lightning.method.labelers import rounded
from cbsa_lightning.method.metrics import pseudo_label_quality
from cbsa_lightning.reports.class_heat_maps import MEASURES


class ClassHistory:
    """Records values of each class at the end of each epoch of the second stage.

    Only the first process records them.

    Attributes:
        epochs: ``(len(MEASURES), C)`` float32 of each epoch, in the order of
            :data:`~cbsa_lightning.reports.class_heat_maps.MEASURES`; NaN if a value is undefined or unknown.
    """

    def __init__(self) -> None:
        self.epochs: dict[int, Tensor] = {}

    def record(self, trainer: Any, pl_module: Any) -> None:
        """Records the values of the current epoch; call it before the next epoch computes new pseudo-labels."""
        data = trainer.datamodule
        labels = pl_module.pseudo_labels
        known = pl_module.stage == "semi-supervised" and labels is not None and hasattr(data, "hidden_targets")
        if not known or not trainer.is_global_zero:
            return
        images = IncompleteImages.of(data)
        rows = torch.as_tensor(images.rows, device=labels.device)
        pseudo, truth = (images.without_known(part) for part in (rounded(labels[rows]).cpu(), data.hidden_targets()))
        unknown = len(pseudo) - (images.known >= 0).sum(0)
        context = pl_module.context_partition.cpu().float()
        values = {
            **_quality(pseudo, truth),
            "coverage": (pseudo >= 0).sum(0) / unknown,  # NaN if all labels of the class are known
            "positives": (pseudo == 1).sum(0),
            "tau_pos": pl_module.tau_pos.cpu(),
            "tau_neg": pl_module.tau_neg.cpu(),
            "context": torch.where(context >= 0, context, torch.nan),
        }
        self.epochs[trainer.current_epoch] = torch.stack([values[name].float() for name in MEASURES])


def _quality(pseudo: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Returns precision and recall ``(C,)`` of the pseudo-labels; NaN for an undefined ratio."""
    quality = pseudo_label_quality(pseudo, truth)
    given = ((pseudo == 1) & (truth >= 0)).any(0)
    return {
        "precision": torch.where(given, quality["class_precision"], torch.nan),
        "recall": torch.where((truth == 1).any(0), quality["class_recall"], torch.nan),
    }
