"""What a run brought, beside what its user could have had instead: zero-shot CLIP, probes, training on labels alone."""

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
    """Trains the labeled-only twin of a finished run and sets its mAP beside those of the baselines and of the run.

    The twin starts from the same weights, with the same stages, schedule and number of steps; only its second stage
    uses labeled images alone. Each number is the last epoch's average of weights, on the validation images.

    Args:
        trainer: The finished run's.
        data: The finished run's.
        untrained: The run's module as it was before training.
        settings: Arguments of the finished run's Trainer.
        baselines: mAP (0 to 1) of further classifiers; see
            :class:`~cbsa_lightning.callbacks.baselines.MeasureBaselines`.

    Returns:
        mAP (0 to 1) of the baselines, "labeled only", where scores are fused with a stack "network alone", and
        "semi-supervised"; also written to ``comparison.csv`` in the run's folder and logged as ``compare/...``.
    """
    folder = folder_of(trainer)
    if folder is None:
        raise ConfigError("There is nothing to compare in a fast_dev_run.")
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
    console.print(f"Against training on the labels alone: {gain:+.1f} points. Everything of this run is in {folder}.")
    best = max(results, key=lambda name: results[name])
    if best != "semi-supervised":
        lost = 100 * (results[best] - results["semi-supervised"])
        console.print(f"The best row is {best!r}, {lost:.1f} points above this run's model.")
