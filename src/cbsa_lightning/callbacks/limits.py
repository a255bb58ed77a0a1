"""What limits the result of a run, said once: unused images, few images to measure on, no gain over the baselines."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cbsa_lightning.callbacks.baselines import (
    LINEAR_PROBE,
    STACKED_PROBES,
    ZERO_SHOT,
    MeasureBaselines,
    validated_table,
)
from cbsa_lightning.callbacks.stage_length import ends_in_warmup

FEW_IMAGES = 50
"""Validation images below which a run warns that its mAP says little."""

FEW_STEPS = 100
"""Optimizer steps of a stage below which a run warns; the shortest warm-up of the paper's configurations has 144."""


class ResultLimits(L.Callback):
    """Warns at the start or the end of a fit about what makes its result worth less than it seems.

    - Training ends within the warm-up, so that unlabeled images are never used.
    - A stage has fewer than :data:`FEW_STEPS` optimizer steps.
    - Fewer than :data:`FEW_IMAGES` images are validated on.
    - The final mAP is not above that of every baseline.

    Args:
        baselines: Measures zero-shot CLIP, and probes where that is cheap.
    """

    def __init__(self, baselines: MeasureBaselines) -> None:
        self._baselines = baselines
        self._told_unused = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Says what is known before the first step."""
        if trainer.fast_dev_run:
            return
        unused = _unlabeled(trainer, pl_module)
        if unused and ends_in_warmup(trainer, pl_module.warmup_epochs):
            self._told_unused = True
            rank_zero_warn(
                f"All of this training belongs to the warm-up (model.warmup_epochs is {pl_module.warmup_epochs}), so "
                f"the {unused} unlabeled images are never used. Lower warmup_epochs or train longer; with the labeler "
                "LabeledOnly the labels alone are meant."
            )
        table = validated_table(trainer)
        if table is not None and len(table) < FEW_IMAGES:
            measured = int((table.labels == 1).any(0).sum())
            rank_zero_warn(
                f"val/mAP is measured on {len(table)} images, with positives of {measured} of {table.num_classes} "
                "classes, so differences of several points are chance. Label more images, or give a test table "
                "(data.source.init_args.test)."
            )

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
            f"{stage} has {pl_module.scheduled_steps} optimizer steps, which is few to learn from. Set "
            f"data.min_steps_per_epoch to {least} or more, or raise {longer}."
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Says what only the end shows."""
        if trainer.fast_dev_run:
            return
        unused = _unlabeled(trainer, pl_module)
        if unused and not self._told_unused and not bool(pl_module.ema.started):
            rank_zero_warn(
                f"Training ended after {trainer.global_step} steps, within the warm-up (model.warmup_epochs is "
                f"{pl_module.warmup_epochs}), so the {unused} unlabeled images were not used. Lower warmup_epochs or "
                "train longer."
            )
        table, found = validated_table(trainer), trainer.callback_metrics.get("val/mAP")
        if table is not None and found is not None and self._baselines.results:
            _tell_result(float(found), len(table), self._baselines.results, pl_module.trains)


def _tell_result(found: float, images: int, baselines: dict[str, float], trains: bool) -> None:
    names = {ZERO_SHOT: "zero-shot CLIP", LINEAR_PROBE: "a linear probe", STACKED_PROBES: "stacked probes"}
    (first, *others), best = baselines, max(baselines, key=lambda name: baselines[name])
    figures = f"val/mAP is {100 * found:.1f} % on {images} images; {names[first]} has {100 * baselines[first]:.1f} %"
    figures += "".join(f", {names[name]} {100 * baselines[name]:.1f} %" for name in others)
    if not trains or found > baselines[best] or found == 1:
        rank_zero_info(f"{figures}.")
    elif best == ZERO_SHOT:
        rank_zero_warn(
            f"Training has not helped: {figures}. Try --config methods/cbsa_safe.yaml, more labeled images or a "
            "longer warm-up (docs/unlabeled.md)."
        )
    else:
        rank_zero_warn(
            f"{names[best].capitalize()}, on frozen features: as good as this model or better. {figures}. --config "
            f"methods/{best.replace(' ', '_')}.yaml after the other files fits that in seconds."
        )


def _unlabeled(trainer: Any, pl_module: Any) -> int:
    """Unlabeled images that training is to use."""
    split = getattr(trainer.datamodule, "split", None)
    return 0 if split is None or pl_module.second_stage != "semi-supervised" else len(split.unlabeled)
