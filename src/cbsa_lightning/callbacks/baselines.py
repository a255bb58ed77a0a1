"""What classifiers on frozen features reach, measured before training on the images that training is measured on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from cbsa_lightning.descriptions import describe_images, evidence_of
from cbsa_lightning.errors import DataError
from cbsa_lightning.linear_probe import LinearProbe
from cbsa_lightning.metrics import MultilabelReport
from cbsa_lightning.stacking import StackedProbes

ZERO_SHOT, LINEAR_PROBE, STACKED_PROBES = "zero-shot", "linear probe", "stacked probes"


class MeasureBaselines(L.Callback):
    """Measures zero-shot CLIP, a linear probe and stacked probes of the labelled images on the validation images.

    The linear probe takes the mean of the frozen features; the stack takes all descriptions and the unlabelled images.
    A resumed run has the figures from its checkpoint, since a trained attention pool is not CLIP's own any more.

    Attributes:
        results: mAP (0 to 1) by name; empty where no image is validated on or the network has no frozen tower, without
            zero-shot where it has no text tower, and without the stack where the labelled images are too few for it.
    """

    def __init__(self) -> None:
        self.results: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The figures."""
        return {"results": self.results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them from :meth:`state_dict`."""
        self.results = state_dict["results"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fits and measures, unless the run is resumed."""
        frozen = pl_module.network.frozen_weights is not None
        if trainer.fast_dev_run or trainer.ckpt_path is not None or not trainer.limit_val_batches or not frozen:
            return
        data = trainer.datamodule
        evidence = pl_module.evidence
        if evidence is None:
            evidence = evidence_of(trainer, pl_module, pl_module.second_stage == "semi-supervised")
        table = data.eval_table()
        rows = np.arange(len(table))
        validation = describe_images(trainer, pl_module, data.val_dataloader(), rows, table.paths)
        truth = torch.from_numpy(table.labels)
        if validation.scores:
            self.results[ZERO_SHOT] = _mAP(validation.scores[0].cpu(), truth)
        inputs = [part.cpu().numpy() for part in (*validation.descriptors, *validation.scores)]
        for name, labeler in ((LINEAR_PROBE, LinearProbe()), (STACKED_PROBES, StackedProbes())):
            with suppress(DataError):  # too few labelled images
                self.results[name] = _mAP(torch.from_numpy(labeler.fit(evidence).logits(inputs)), truth)


def _mAP(logits: Tensor, truth: Tensor) -> float:
    report = MultilabelReport(truth.shape[1])
    report.sync_on_compute = False  # every process has all images
    report.update(logits, truth)
    return float(report.compute()["mAP"])
