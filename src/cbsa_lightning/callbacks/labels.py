"""Writes predicted labels and lists of images to label or to check when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor

from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.callbacks.predictions import gather, packed
from cbsa_lightning.callbacks.scoring import score_batches
from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.data.incomplete import IncompleteImages
from cbsa_lightning.inference.labels.image_labels import SURE, ImageLabels, check_class_columns, write_labels
from cbsa_lightning.inference.labels.review import next_to_label, suspicious_labels, write_list
from cbsa_lightning.inference.predictions import in_table_order
from cbsa_lightning.io.runs import LABELS, NEXT_TO_LABEL, SUSPICIOUS_LABELS, folder_of
from cbsa_lightning.method.finite import refuse_scores


class WriteLabels(L.Callback):
    """Writes labels of the images with unknown labels into the run's folder when training ends.

    - ``labels.csv``: one row per unlabeled image, followed by one per partly labeled image, whose known labels are
      kept; see :func:`~cbsa_lightning.inference.labels.image_labels.write_labels`.
    - ``next_to_label.csv``: the images whose labels would be most useful.
    - ``suspicious_labels.csv``: given labels that out-of-fold probabilities contradict. This file needs a
      ``stack_share``, since other models have no out-of-fold probabilities.

    Without a ``stack_share``, scores are not calibrated probabilities, so no label is marked for review. Nothing is
    written for a custom data module or in a ``fast_dev_run``.

    Args:
        enabled: Whether to write the files. If False, the images are not scored.
        budget: Length of the list of images to label next.
        sure: Minimum probability of being correct; decisions with a lower probability are marked for review.
        favor_rare: Whether classes with few labeled positives get more weight in the list of images to label next.

    Raises:
        ConfigError: If ``budget`` is below 1, or ``sure`` is outside [0, 1].
    """

    def __init__(self, enabled: bool = True, budget: int = 200, sure: float = SURE, favor_rare: bool = False) -> None:
        check_flags(**{"labels.enabled": enabled, "labels.favor_rare": favor_rare})
        check_number("labels.budget", budget, 1, whole=True)
        check_number("labels.sure", sure, 0, 1)
        self.enabled, self.budget, self.sure, self.favor_rare = enabled, budget, sure, favor_rare

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Rejects, before training, class names that the table cannot contain.

        Raises:
            ConfigError: See :func:`~cbsa_lightning.inference.labels.image_labels.check_class_columns`.
        """
        if self._has_unknown(trainer):
            check_class_columns(pl_module.class_names)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Scores the images on all processes; the first process writes the files."""
        folder = folder_of(trainer) if self._has_unknown(trainer) else None
        if folder is None:
            return
        scores = self._scores(trainer, pl_module)
        if trainer.is_global_zero:
            self._write(folder, trainer.datamodule, pl_module, scores)

    def _has_unknown(self, trainer: Any) -> bool:
        data = trainer.datamodule
        return self.enabled and hasattr(data, "plain_dataloader") and len(IncompleteImages.of(data).rows) > 0

    def _scores(self, trainer: Any, pl_module: Any) -> NDArray[np.float32]:
        """Returns scores ``(n, C)`` of the plain views of the n images with unknown labels."""
        data = trainer.datamodule
        rows = IncompleteImages.of(data).rows
        images = data.train_table.paths
        thresholds = pl_module.decision_thresholds()
        parts: list[Any] = []

        def keep(batch: EvalBatch, _: Tensor, logits: Tensor) -> None:
            scores = logits.float().sigmoid()
            refuse_scores(scores, images[batch.index.cpu().numpy()].__getitem__, "Labels")
            parts.append(packed({"index": batch.index, "scores": scores, "labels": scores >= thresholds}))

        score_batches(trainer, pl_module, data.plain_dataloader(rows), pl_module.final_logits, keep, "Labels")
        others = np.setdiff1d(np.arange(len(images)), rows)
        found, _ = in_table_order(len(images), len(pl_module.class_names), gather(parts), others.tolist())
        of_rows: NDArray[np.float32] = found[rows]
        return of_rows

    def _write(self, folder: Path, data: Any, pl_module: Any, scores: NDArray[np.float32]) -> None:
        names = tuple(pl_module.class_names)
        incomplete = IncompleteImages.of(data)
        images, known = data.train_table.paths, data.labeled_targets().numpy()
        sure = self.sure if pl_module.fusion is not None else None
        thresholds = pl_module.decision_thresholds().cpu().numpy()
        labels = ImageLabels.decided(images[incomplete.rows], names, scores, thresholds, sure).with_known(
            len(incomplete.unlabeled), incomplete.known.numpy()
        )
        write_labels(folder / LABELS, labels)
        positives = (known == 1).sum(0) if self.favor_rare else None
        write_list(folder / NEXT_TO_LABEL, next_to_label(labels, self.budget, positives))
        partly = f" and {len(incomplete.partly)} partly labeled" if len(incomplete.partly) else ""
        told = f"Labels of {len(incomplete.unlabeled)} unlabeled{partly} images: {folder / LABELS}"
        if pl_module.left_out is not None:
            left_out = pl_module.left_out.cpu().numpy()
            doubtful = suspicious_labels(images[data.split.labeled], names, known, left_out)
            write_list(folder / SUSPICIOUS_LABELS, doubtful)
            told += f" ({int(labels.review.any(1).sum())} have labels to review)"
            told += f"; {doubtful.num_rows} given labels to check: {folder / SUSPICIOUS_LABELS}"
        rank_zero_info(f"{told}.")
