"""What limits the result of a run, said once: unused images, few images to measure on, no gain over CLIP itself."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cbsa_lightning.metrics import MultilabelReport
from cbsa_lightning.stage_length import ends_in_warmup

FEW_IMAGES = 50
"""Validation images below which a run warns that its mAP says little."""

FEW_STEPS = 100
"""Optimiser steps of a stage below which a run warns; the shortest warm-up of the paper's configurations has 144."""


class ResultLimits(L.Callback):
    """Warns at the start or the end of a fit about what makes its result worth less than it seems.

    - Training ends within the warm-up, so that unlabelled images are never used.
    - A stage has fewer than :data:`FEW_STEPS` optimiser steps.
    - Fewer than :data:`FEW_IMAGES` images are validated on.
    - The final mAP is not above that of zero-shot CLIP on the same images. The frozen towers score them once before
      training, since a trained attention pool is not CLIP's own any more; a resumed run has the figure from its
      checkpoint. Not measured where ``limit_val_batches`` leaves images out.
    """

    def __init__(self) -> None:
        self._zero_shot: float | None = None
        self._told_unused = False

    def state_dict(self) -> dict[str, Any]:
        """The mAP of zero-shot CLIP."""
        return {"zero_shot": self._zero_shot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from :meth:`state_dict`."""
        self._zero_shot = state_dict["zero_shot"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Says what is known before the first step."""
        if trainer.fast_dev_run:
            return
        unused = _unlabelled(trainer, pl_module)
        if unused and ends_in_warmup(trainer, pl_module.warmup_epochs):
            self._told_unused = True
            rank_zero_warn(
                f"All of this training belongs to the warm-up (model.warmup_epochs is {pl_module.warmup_epochs}), so "
                f"the {unused} unlabelled images are never used. Lower warmup_epochs or train longer; with the labeler "
                "LabelledOnly the labels alone are meant."
            )
        table = _validated(trainer)
        if table is None:
            return
        if len(table) < FEW_IMAGES:
            measured = int((table.labels == 1).any(0).sum())
            rank_zero_warn(
                f"val/mAP is measured on {len(table)} images, with positives of {measured} of {table.num_classes} "
                "classes, so differences of several points are chance. Label more images, or give a test table "
                "(data.source.init_args.test)."
            )
        if trainer.ckpt_path is None:
            self._zero_shot = _zero_shot_mAP(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Says at the start of a stage that it has few steps."""
        first, end = trainer.current_epoch, trainer.max_epochs
        enough = pl_module.scheduled_steps >= FEW_STEPS or not pl_module.trains
        if trainer.fast_dev_run or enough or first not in (0, pl_module.warmup_epochs):
            return
        stage, longer = "The second stage", "trainer.max_epochs"
        if pl_module.stage == "warm-up":
            stage, longer, end = "The warm-up", "model.warmup_epochs", pl_module.warmup_epochs
        least = -(-FEW_STEPS // (end - first)) if end > first else FEW_STEPS  # -1: as long as max_steps says
        rank_zero_warn(
            f"{stage} has {pl_module.scheduled_steps} optimiser steps, which is few to learn from. Set "
            f"data.min_steps_per_epoch to {least} or more, or raise {longer}."
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Says what only the end shows."""
        if trainer.fast_dev_run:
            return
        unused = _unlabelled(trainer, pl_module)
        if unused and not self._told_unused and not bool(pl_module.ema.started):
            rank_zero_warn(
                f"Training ended after {trainer.global_step} steps, within the warm-up (model.warmup_epochs is "
                f"{pl_module.warmup_epochs}), so the {unused} unlabelled images were not used. Lower warmup_epochs or "
                "train longer."
            )
        table, found = _validated(trainer), trainer.callback_metrics.get("val/mAP")
        if table is None or found is None or self._zero_shot is None:
            return
        figures = f"{100 * float(found):.1f} % on {len(table)} images; zero-shot CLIP has {100 * self._zero_shot:.1f} %"
        if float(found) > self._zero_shot or not pl_module.trains:
            rank_zero_info(f"val/mAP is {figures}.")
        else:
            rank_zero_warn(
                f"Training has not helped: val/mAP is {figures}. Try --config methods/cbsa_safe.yaml, more labelled "
                "images or a longer warm-up (docs/unlabelled.md)."
            )


def _unlabelled(trainer: Any, pl_module: Any) -> int:
    """Unlabelled images that training is to use."""
    split = getattr(trainer.datamodule, "split", None)
    return 0 if split is None or pl_module.second_stage != "semi-supervised" else len(split.unlabelled)


def _validated(trainer: Any) -> Any:
    """The table of the images that validation measures; None where it measures none, or only a part of them."""
    every = trainer.limit_val_batches == 1.0 and isinstance(trainer.limit_val_batches, float)
    return trainer.datamodule.eval_table() if every and hasattr(trainer.datamodule, "eval_table") else None


@torch.no_grad()
def _zero_shot_mAP(trainer: Any, pl_module: Any) -> float | None:
    """Of the validation images, by the towers as they are now; None for a network without zero-shot scores."""
    if pl_module.network.frozen_weights is None:
        return None
    describe = pl_module.network.describer()
    report = MultilabelReport(len(pl_module.class_names)).to(pl_module.device)
    for batch in trainer.datamodule.val_dataloader():
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
        with trainer.precision_plugin.forward_context():
            scores = describe(pl_module.features_of(batch)).scores
        if not scores:
            return None
        report.update(scores[0], batch.targets)
    return float(report.compute()["mAP"])
