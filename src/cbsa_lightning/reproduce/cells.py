"""Runs the cells of the paper's tables.

A cell is one combination of system, data set, labeled fraction and seed. Each cell is a separate run. A finished cell
is not run again.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.loggers import WandbLogger

import cbsa_lightning
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.checkpoints.files import newest_checkpoint, remove_drafts
from cbsa_lightning.cli.lightning_cli import make_cli
from cbsa_lightning.cli.overlays import Settings
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import lock
from cbsa_lightning.reproduce.recipes import Cell
from cbsa_lightning.reproduce.wandb_runs import with_run_name


def result_of(cell: Cell, out: Path) -> Settings | None:
    """Returns the result of a finished cell, or None if the cell is not finished."""
    file = out / cell.folder / "result.json"
    found: Settings | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def make(cell: Cell, out: Path, keep_checkpoint: bool = False, table: int | None = None) -> bool:
    """Runs a cell unless it is finished, and resumes an interrupted one from its last checkpoint.

    Several processes may work in the same ``out``. A cell that another process is running is skipped.

    Args:
        cell: The cell.
        out: Folder that contains the folder of the cell.
        keep_checkpoint: Whether to keep the checkpoint of the finished cell.
        table: Number of the table that the cell is run for, which is part of the group of its W&B run.

    Returns:
        Whether the cell is finished.
    """
    folder = out / cell.folder
    locked = lock(folder)
    if locked is None:
        return False
    with locked:
        if result_of(cell, out) is None:
            found = json.dumps(_run(cell, folder, table), indent=1)
            with replacing(folder / "result.json") as draft:
                draft.write_text(found, encoding="utf-8")
            if not keep_checkpoint:
                (folder / "last.ckpt").unlink(missing_ok=True)
    return True


def busy(cell: Cell, out: Path) -> bool:
    """Returns whether a process is running the cell."""
    folder = out / cell.folder
    if not folder.is_dir():
        return False
    locked = lock(folder)
    if locked is not None:
        locked.close()
    return locked is None


def refuse_ranks() -> None:
    """Checks that this process is not one of several ranks, because each rank would run the same cells.

    Raises:
        ConfigError: If torchrun or a similar launcher started this process.
    """
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("A cell runs in one process: start `cbsa table` once per GPU, without torchrun.")


def _run(cell: Cell, folder: Path, table: int | None) -> Settings:
    refuse_ranks()
    trainer = cell.recipe.get("trainer", {})
    if not trainer.get("max_epochs"):
        raise ConfigError("The recipe of a cell has no trainer.max_epochs, so the cell would not end; set it.")
    recipe, here = folder / "recipe.yaml", folder / "here.yaml"
    for file, settings in ((recipe, cell.recipe), (here, _here(folder, cell, table))):
        with replacing(file) as draft:
            draft.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    remove_drafts(folder)
    checkpoint = newest_checkpoint(folder)
    resume = [f"--ckpt_path={checkpoint}"] if checkpoint is not None else []
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Checkpoint directory .* exists and is not empty"
        )  # expected for a resumed cell
        cli = make_cli(["fit", f"--config={recipe}", f"--config={here}", *resume])
    found = _found(cli, time.monotonic() - begun)
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # otherwise the W&B run would stay open until the next cell starts
    del cli
    gc.collect()  # frees the reference cycle of Trainer and module, because the next cell needs the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"cell": cell.name, "row": cell.row.label, "data": cell.data, "share": cell.share, "seed": cell.seed} | found


def _here(folder: Path, cell: Cell, table: int | None) -> Settings:
    """Returns settings that do not depend on the recipe: one device, all output in ``folder``, the last checkpoint."""
    trainer: Settings = {"devices": 1}
    if "logger" in cell.recipe["trainer"]:
        trainer["logger"] = with_run_name(cell.recipe["trainer"]["logger"], cell, table)
    else:
        logger = {"save_dir": str(folder), "name": "log"}  # each start writes a new subfolder
        trainer["logger"] = {"class_path": "RunLogger", "init_args": logger}
    # save_last is not used: lightning 2.6 writes it only together with another checkpoint or when training ends.
    checkpoint = {
        **{"dirpath": str(folder), "filename": "last", "enable_version_counter": False},
        **{"monitor": None, "save_top_k": 1, "save_last": False},
        "save_on_train_epoch_end": True,  # after the report has stored the metrics of the epoch
    }
    without = {name: {"enabled": False} for name in ("labels", "report_page")}
    return {"trainer": trainer, "checkpoint": checkpoint, **without}


def _found(cli: Any, seconds: float) -> Settings:
    """Returns the result of a finished run: all metrics of all epochs, and the images and versions it used."""
    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, RunReport))
    last = cli.trainer.max_epochs - 1
    if last not in report.history.get("val/mAP", {}):
        raise ConfigError(
            f"The run ended without validation in its last epoch, {last}. Remove callbacks and limits that stop it "
            "early."
        )
    data = cli.datamodule
    test, mask = data.eval_table(), data.label_mask
    gpu = cli.trainer.strategy.root_device.type == "cuda"
    return {
        "positives": dict(zip(test.class_names, (test.labels == 1).sum(0).tolist(), strict=True)),
        "history": {
            name: {epoch: None if math.isnan(value) else value for epoch, value in values.items()}
            for name, values in report.history.items()
        },
        "measured_on": "held-out labeled images" if len(data.split.held_out) else "test images",
        # Of the table before labels are hidden, which the known fraction and the seed determine.
        "images": [mask.table_digest if mask is not None else data.train_table.digest(), test.digest()],
        "seconds_since_last_start": seconds,
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "versions": {"cbsa_lightning": cbsa_lightning.__version__, "torch": torch.__version__},
    }
