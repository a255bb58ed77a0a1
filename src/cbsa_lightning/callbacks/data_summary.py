"""Prints a summary of the data before the first step."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from cbsa_lightning.errors import listed

SHOWN = 20  # maximum number of classes in the summary


class DataSummary(L.Callback):
    """Prints notes of the reader, the number of images of each kind, and the classes with the fewest positives.

    Custom data modules are not summarized.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Prints the summary on the first process."""
        data = trainer.datamodule
        if not all(hasattr(data, name) for name in ("split", "source", "labeled_targets")):
            return
        for note in data.source.describe():
            rank_zero_info(note)
        split, labels = data.split, data.labeled_targets().numpy()
        counts = [
            f"{len(rows):,} {kind}"
            for kind, rows in (
                ("labeled", split.labeled),
                ("unlabeled", split.unlabeled),
                ("held out", split.held_out),
            )
        ]
        partly = int((labels < 0).any(1).sum())
        counts[0] += f" ({partly:,} in part)" if partly else ""
        positives = (labels == 1).sum(0)
        fewest = np.argsort(positives, kind="stable")
        classes = listed([f"{pl_module.class_names[k]} {positives[k]:,}" for k in fewest], SHOWN)
        rank_zero_info(
            f"Training images: {', '.join(counts)}. Labeled positives of {len(positives):,} classes, fewest first: "
            f"{classes}."
        )
