"""Compares a run with zero-shot CLIP, probes, and training on labeled images only."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from cbsa_lightning.callbacks.baselines import LINEAR_PROBE, STACKED_PROBES, ZERO_SHOT
from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import folder_of
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.training.module import SSMLLModule


def compare(
    trainer: L.Trainer,
    data: SSMLLDataModule,
    untrained: SSMLLModule,
    settings: dict[str, Any],
    baselines: Mapping[str, float],
) -> dict[str, float]:
    """Trains a labeled-only version of a finished run, and compares its mAP with that of the run and the baselines.

    The labeled-only version starts from the same weights and has the same stages, schedule and number of steps, but its
    second stage uses labeled images only. Each mAP is measured on the validation images with the averaged weights after
    the last epoch.

    Args:
        trainer: The Trainer of the finished run.
        data: The data module of the finished run.
        untrained: The run's module before training.
        settings: Arguments of the finished run's Trainer.
        baselines: mAP (0 to 1) of other classifiers; see
            :class:`~cbsa_lightning.callbacks.baselines.MeasureBaselines`.

    Returns:
        mAP (0 to 1) of the baselines, "labeled only", "network alone" if scores are fused with a stack, and
        "semi-supervised". These values are also written to ``comparison.csv`` in the run's folder and logged as
        ``compare/...``.
    """
    folder = folder_of(trainer)
    if folder is None:
        raise ConfigError("A fast_dev_run has no result to compare.")
    results = dict(baselines)
    own = {
        "callbacks": [],
        "enable_checkpointing": False,
        "logger": CSVLogger(folder, name="labeled_only", version=""),
    }
    untrained.labeler, untrained.tells_limits = LabeledOnly(), False
    twin = L.Trainer(**{**settings, **own})
    twin.fit(untrained, datamodule=data)
    results["labeled only"] = float(twin.callback_metrics["val/mAP"])
    if "val/mAP_network" in trainer.callback_metrics:
        results["network alone"] = float(trainer.callback_metrics["val/mAP_network"])
    results["semi-supervised"] = float(trainer.callback_metrics["val/mAP"])

    if trainer.is_global_zero:
        with replacing(folder / "comparison.csv") as draft, draft.open("w", newline="") as file:
            csv.writer(file).writerows([["run", "mAP"], *results.items()])
        for logger in trainer.loggers:
            logger.log_metrics({f"compare/{name.replace(' ', '_')}": value for name, value in results.items()})
            logger.save()
        _print(results, data, folder)
    return results


def _print(results: dict[str, float], data: SSMLLDataModule, folder: Path) -> None:
    labeled, unlabeled = len(data.split.labeled), len(data.split.unlabeled)
    table = Table(title=f"mAP on {len(data.eval_table())} validation images, in %")
    table.add_column("run")
    table.add_column("learns from")
    table.add_column("mAP", justify="right")
    sources = {
        ZERO_SHOT: "class names only",
        LINEAR_PROBE: f"{labeled} labeled images, frozen features",
        STACKED_PROBES: f"{labeled} labeled images, class names, frozen features",
        "labeled only": f"{labeled} labeled images",
        "network alone": f"{labeled} labeled + {unlabeled} unlabeled images",
        "semi-supervised": f"{labeled} labeled + {unlabeled} unlabeled images",
    }
    for name, value in results.items():
        table.add_row(name, sources[name], f"{100 * value:.1f}")
    console = Console()
    console.print(table)
    gain = 100 * (results["semi-supervised"] - results["labeled only"])
    console.print(f"Gain over training on labeled images only: {gain:+.1f} points. Files of this run: {folder}.")
    best = max(results, key=lambda name: results[name])
    if best != "semi-supervised":
        lost = 100 * (results[best] - results["semi-supervised"])
        console.print(f"The best model is {best!r}. Its mAP is {lost:.1f} points above that of this run.")
