"""Warns about limits of a run's result: unused images, a small validation set, or no gain over the baselines."""

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
"""Number of validation images below which a run issues a warning that its mAP is imprecise."""

FEW_STEPS = 100
"""Number of optimizer steps of a stage below which a run issues a warning.

The paper's shortest warm-up has 144 steps.
"""


class ResultLimits(L.Callback):
    """Warns at the start or the end of a fit if one of the following conditions limits its result.

    - Training ends within the warm-up, so unlabeled images are never used.
    - A stage has fewer than :data:`FEW_STEPS` optimizer steps.
    - Fewer than :data:`FEW_IMAGES` images are used for validation.
    - The final mAP is not higher than that of all baselines.

    Args:
        baselines: Callback that evaluates zero-shot CLIP, and the probes if this is cheap.
    """

    def __init__(self, baselines: MeasureBaselines) -> None:
        self._baselines = baselines
        self._told_unused = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warns about conditions that are known before the first step."""
        if trainer.fast_dev_run:
            return
        unused = _unlabeled(trainer, pl_module)
        if unused and ends_in_warmup(trainer, pl_module.warmup_epochs):
            self._told_unused = True
            rank_zero_warn(
                f"The whole run consists of the warm-up (model.warmup_epochs is {pl_module.warmup_epochs}), so the "
                f"{unused} unlabeled images are never used. Lower warmup_epochs or train longer. To train on labeled "
                "images only, use the labeler LabeledOnly."
            )
        table = validated_table(trainer)
        if table is not None and len(table) < FEW_IMAGES:
            measured = int((table.labels == 1).any(0).sum())
            rank_zero_warn(
                f"val/mAP is measured on {len(table)} images, with positives of {measured} of {table.num_classes} "
                "classes, so differences of several points may be due to chance. Label more images or add a test table "
                "(data.source.init_args.test)."
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Warns at the start of a stage that has few steps."""
        first, end = trainer.current_epoch, trainer.max_epochs
        enough = pl_module.scheduled_steps >= FEW_STEPS or not pl_module.trains
        if trainer.fast_dev_run or enough or first not in (0, pl_module.warmup_epochs):
            return
        stage, longer = "The second stage", "trainer.max_epochs"
        if pl_module.stage == "warm-up":
            stage, longer, end = "The warm-up", "model.warmup_epochs", pl_module.warmup_epochs
        least = -(-FEW_STEPS // (end - first)) if end > first else FEW_STEPS  # -1 if max_steps sets the length
        rank_zero_warn(
            f"{stage} has {pl_module.scheduled_steps} optimizer steps, which may be too few. Set "
            f"data.min_steps_per_epoch to {least} or more, or raise {longer}."
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warns about unused images and compares the result with the baselines."""
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
            f"Training did not help: {figures}. Try --config methods/cbsa_safe.yaml, more labeled images or a "
            "longer warm-up (docs/explanation/unlabeled.md)."
        )
    else:
        rank_zero_warn(
            f"This model is not better than {names[best]} on frozen features: {figures}. To train this baseline in "
            f"seconds, add --config methods/{best.replace(' ', '_')}.yaml after the other files."
        )


def _unlabeled(trainer: Any, pl_module: Any) -> int:
    """Returns the number of unlabeled images that training uses."""
    split = getattr(trainer.datamodule, "split", None)
    return 0 if split is None or pl_module.second_stage != "semi-supervised" else len(split.unlabeled)
