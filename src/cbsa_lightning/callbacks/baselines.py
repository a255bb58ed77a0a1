"""Baselines on frozen features, which are evaluated on the validation images before training."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from cbsa_lightning.data.descriptions import describe_images, evidence_of
from cbsa_lightning.errors import DataError
from cbsa_lightning.method.linear_probe import LinearProbe
from cbsa_lightning.method.metrics import MultilabelReport
from cbsa_lightning.method.stacking import StackedProbes

ZERO_SHOT, LINEAR_PROBE, STACKED_PROBES = "zero-shot", "linear probe", "stacked probes"


class MeasureBaselines(L.Callback):
    """Evaluates zero-shot CLIP, a linear probe and stacked probes on the validation images.

    The linear probe uses the mean of the frozen features; the stack uses all descriptors and the unlabeled images. A
    resumed run loads the results from its checkpoint, since a trained attention pool differs from CLIP's own.

    Args:
        always_probes: Whether to evaluate the probes even if the labeler does not need features of the training images.
            This takes an extra pass over these images.

    Attributes:
        results: mAP (0 to 1) by name. It is empty if validation covers only a part of its images or the network has no
            frozen tower. Zero-shot CLIP is missing if the network has no text tower, and a probe is missing if there
            are too few labeled images for it.
    """

    def __init__(self, always_probes: bool = True) -> None:
        self.always_probes = always_probes
        self.results: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the results."""
        return {"results": self.results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.results = state_dict["results"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fits the probes and evaluates all baselines, unless the run is resumed."""
        table = validated_table(trainer)
        frozen = pl_module.network.frozen_weights is not None
        if trainer.fast_dev_run or trainer.ckpt_path is not None or table is None or not frozen:
            return
        loader = trainer.datamodule.val_dataloader()
        validation = describe_images(trainer, pl_module, loader, np.arange(len(table)), table.paths)
        truth = torch.from_numpy(table.labels)
        if validation.scores:
            self.results[ZERO_SHOT] = _mAP(validation.scores[0].cpu(), truth)
        evidence = pl_module.evidence
        if evidence is None and self.always_probes:
            evidence = evidence_of(trainer, pl_module, pl_module.second_stage == "semi-supervised")
        if evidence is None:
            return
        inputs = [part.cpu().numpy() for part in (*validation.descriptors, *validation.scores)]
        for name, labeler in ((LINEAR_PROBE, LinearProbe()), (STACKED_PROBES, StackedProbes())):
            with suppress(DataError):  # too few labeled images
                self.results[name] = _mAP(torch.from_numpy(labeler.fit(evidence).logits(inputs)), truth)


def validated_table(trainer: Any) -> Any:
    """Returns the table of the validation images, or None if validation does not cover all of them."""
    every = trainer.limit_val_batches == 1.0 and isinstance(trainer.limit_val_batches, float)
    return trainer.datamodule.eval_table() if every and hasattr(trainer.datamodule, "eval_table") else None


def _mAP(logits: Tensor, truth: Tensor) -> float:
    report = MultilabelReport(truth.shape[1])
    report.sync_on_compute = False  # every process has all images
    report.update(logits, truth)
    return float(report.compute()["mAP"])
