"""Reports the changes since the run that training started from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from cbsa_lightning.callbacks.baselines import validated_table
from cbsa_lightning.callbacks.predictions import gather, packed
from cbsa_lightning.callbacks.scoring import score_batches
from cbsa_lightning.checkpoints.earlier_run import EarlierRun
from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.data.labeled_images import LabeledImages, rows_among
from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.predictions import in_table_order
from cbsa_lightning.io.runs import CHANGES, folder_of
from cbsa_lightning.networks.cbsa import SETTINGS
from cbsa_lightning.reports.changes import Changes, class_AP, in_order_of, label_changes, write_changes


class ReportChanges(L.Callback):
    """Compares the model of an earlier run with the newly trained model on the same validation images.

    Images whose labels the earlier run was trained on are skipped. The changes are printed and written to
    ``changes.csv`` in the run's folder. A resumed run loads the earlier metrics from its checkpoint. The models are not
    compared if validation covers only a part of its images, or if the training images of the earlier run are unknown.

    Args:
        earlier: The earlier run.

    Attributes:
        told: The changes, as sentences; empty until training has ended.
    """

    def __init__(self, earlier: EarlierRun) -> None:
        self.earlier = earlier
        self.told: list[str] = []
        self._classifier: Classifier | None = None
        self._before: Tensor | None = None  # AP (C',) of the earlier run's classes, in the order of the new run

    def state_dict(self) -> dict[str, Any]:
        """Returns the metrics of the earlier run."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self._before = state_dict["before"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Builds the earlier model before training.

        Raises:
            CheckpointError: If the model cannot be built, or was trained on images of another size.
        """
        if stage != "fit" or trainer.ckpt_path is not None:
            return
        size, here = self.earlier.weights.image_size, trainer.datamodule.image_size
        if size not in (None, here):
            raise CheckpointError(
                f"{self.earlier.file} was trained on images of {size} pixels; this run uses {here}. Set "
                f"data.image_size to {size}, or remove --init_from."
            )
        if reason := self._why_not(trainer):
            rank_zero_warn(f"The earlier run is not compared with this one: {reason}.")
            return
        if trained := int(self._trained(trainer).sum()):
            rank_zero_warn(
                f"{self.earlier.file} was trained on the labels of {trained} validation images. The comparison with it "
                "skips these images, but this run's own metrics do not and may be too high."
            )
        with torch.random.fork_rng(devices=[]):  # the network is initialized before its weights are loaded
            self._classifier = self._load(pl_module, here)

    def _why_not(self, trainer: Any) -> str:
        if trainer.fast_dev_run or validated_table(trainer) is None:
            return "validation covers only a part of its images"
        if self.earlier.labeled is None:
            return (
                f"it is unknown which images {self.earlier.file} was trained on, so this run's metrics may be too "
                "high. Pass the run's folder to --init_from if it has a labeled.parquet"
            )
        data = trainer.datamodule
        tables = [table for table in (data.train_table, data.test_table) if table is not None]
        if not any(rows_among(table, self.earlier.labeled.trained()).any() for table in tables):
            return (
                "none of the images that it was trained on is in this run's tables. If only their paths have "
                "changed, this run's metrics may be too high"
            )
        return ""

    def _load(self, pl_module: Any, size: int) -> Classifier:
        own = {name: pl_module.hparams[name] for name in ("clip", "pretrained") if name in pl_module.hparams}
        if SETTINGS.keys() <= set(pl_module.hparams) and pl_module.hparams["decoder"] is None:
            return Classifier.load(self.earlier.file, image_size=size, **own)
        return Classifier.load(self.earlier.file, image_size=size, network=pl_module.make_network)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Evaluates the earlier model on all processes."""
        if self._classifier is None:
            return
        classifier = self._classifier.to(pl_module.device)
        logits = in_order_of(
            pl_module.class_names, self._logits(trainer, pl_module, classifier.logits_of), classifier.class_names
        )
        self._before = torch.from_numpy(self._measured(trainer, logits))
        self._classifier = None

    def _logits(self, trainer: Any, pl_module: Any, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns logits ``(n, C)`` of all validation images on the CPU."""
        data, parts = trainer.datamodule, list[Any]()

        def keep(batch: EvalBatch, _: Tensor, logits: Tensor) -> None:
            parts.append(packed({"index": batch.index, "scores": logits, "labels": logits > 0}))

        score_batches(trainer, pl_module, data.val_dataloader(), logits_of, keep, "Changes")
        return torch.from_numpy(in_table_order(len(data.eval_table()), parts[0][1].shape[1], gather(parts))[0])

    def _measured(self, trainer: Any, logits: Tensor) -> Any:
        """Returns AP ``(C,)`` on images that the earlier run was not trained on; NaN for classes with NaN logits."""
        table = trainer.datamodule.eval_table()
        rows = ~self._trained(trainer)
        known = ~logits.isnan().all(0)
        result = np.full(logits.shape[1], np.nan)
        targets = torch.from_numpy(table.labels[rows])
        if bool(known.any()):
            result[known.numpy()] = class_AP(logits[rows][:, known], targets[:, known])
        return result

    def _trained(self, trainer: Any) -> Any:
        """Returns a mask ``(n,)`` of the validation images that the earlier run was trained on."""
        labeled = self.earlier.labeled
        return rows_among(trainer.datamodule.eval_table(), frozenset() if labeled is None else labeled.trained())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluates the new model; the first process prints and writes the changes."""
        folder = folder_of(trainer)
        if folder is None or self._before is None or self.earlier.labeled is None:
            return
        after = self._measured(trainer, self._logits(trainer, pl_module, pl_module.final_logits))
        if not trainer.is_global_zero:
            return
        data, names = trainer.datamodule, list(pl_module.class_names)
        gone = [name for name in self.earlier.labeled.class_names if name not in names]
        unknown = np.full(len(gone), np.nan)
        trained = self._trained(trainer)
        positives = (data.eval_table().labels[~trained] == 1).sum(0)
        now = LabeledImages.of(data.train_table, data.split)
        changes = Changes(
            names + gone,
            np.concatenate([self._before.numpy(), unknown]),
            np.concatenate([after, unknown]),
            np.concatenate([positives, np.zeros(len(gone), np.int64)]),
            label_changes(names + gone, self.earlier.labeled, now),
            int((~trained).sum()),
            int(trained.sum()),
        )
        write_changes(folder / CHANGES, changes)
        self.told = changes.sentences()
        rank_zero_info("\n  ".join([f"Changes since {self.earlier.file}: {folder / CHANGES}", *self.told]))
