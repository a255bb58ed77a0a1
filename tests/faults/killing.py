"""Runs of the command line in processes that are killed, and comparison of their files."""

from __future__ import annotations

import csv
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cbsa_lightning import __main__ as cli
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.checkpoints.files import newest_checkpoint, read_checkpoint
from cbsa_lightning.training.loggers import RunLogger
from layouts import make_table
from tiny_data import Squares, tiny_data, tiny_module, tiny_trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def words_of(folder: Path, clip: Path, *more: str) -> list[str]:
    """Returns the command of a tiny run of 1 + 2 epochs, with a checkpoint per step and two validations per epoch."""
    make_table(folder / "data", n_train=26, unlabeled=16)
    return [
        "fit",
        f"--config={CONFIGS / 'methods' / 'cbsa.yaml'}",
        f"--config={CONFIGS / 'data' / 'table.yaml'}",
        f"--data.source.init_args.train={folder / 'data' / 'train.csv'}",
        f"--model.init_args.clip={clip}",
        "--model.init_args.warmup_epochs=1",
        "--model.init_args.prompt_length=2",
        "--model.init_args.decoder_layers=1",
        "--model.init_args.decoder_heads=4",
        "--model.init_args.decoder_feedforward=16",
        "--model.init_args.ema_decay=0.8",
        "--data.image_size=64",
        "--data.batch_size=6",
        "--data.labeled_per_batch=2",
        "--data.warmup_batch_size=3",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=3",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.val_check_interval=0.5",
        "--checkpoint.every_n_train_steps=1",
        "--report.enabled=false",
        *more,
    ]


# name: (settings of ModelCheckpoint, settings of the Trainer)
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every step": ({"every_n_train_steps": 1}, {}),
    "every third step, two validations an epoch": ({"every_n_train_steps": 3}, {"val_check_interval": 0.5}),
    "after validation": ({"monitor": "val/mAP", "mode": "max", "save_on_train_epoch_end": False}, {}),
    "at the epoch's end": ({"save_on_train_epoch_end": True}, {"check_val_every_n_epoch": 2}),
    "by the clock, gradients accumulated": (
        {"train_time_interval": timedelta(seconds=0.05)},
        {"accumulate_grad_batches": 2},
    ),
}


def fit(run: Path, clip: Path, source: Squares, policy: str) -> None:
    """Starts a tiny run in a folder, or resumes it."""
    keep, settings = POLICIES[policy]
    callbacks = [ModelCheckpoint(run / "checkpoints", save_last=True, **keep), RunReport(enabled=False)]
    logger = RunLogger(run.parent, "", run.name)
    trainer = tiny_trainer(run, 3, logger=logger, callbacks=callbacks, enable_checkpointing=True, **settings)
    trainer.fit(tiny_module(clip), datamodule=tiny_data(source), ckpt_path=newest_checkpoint(run))
    trainer.save_checkpoint(run / "end.ckpt")


def command(words: list[str], run: Path) -> None:
    """Runs the command line and saves the final state, which the checkpoints need not contain."""
    cli.main(words).trainer.save_checkpoint(run / "end.ckpt")


def in_a_process(do: Callable[[], Any], log: Path, kill: tuple[float, int] | None = None) -> int:
    """Runs a function in a forked process, which inherits imports that take ten seconds.

    Args:
        do: The function.
        log: File for its output.
        kill: Seconds until the process receives a signal, and the signal.

    Returns:
        The exit status; negative if a signal ended the process.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            torch.set_num_threads(1)
            do()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) and stop.code else 9
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill is not None:
        end = time.monotonic() + kill[0]
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, kill[1])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left_behind(run: Path) -> dict[str, Any]:
    """Returns the final state of a run without times and paths, which must be bit-identical in two runs."""
    checkpoint = read_checkpoint(run / "end.ckpt")
    report = next(state for key, state in checkpoint["callbacks"].items() if key.startswith("RunReport"))
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)]
    return {
        "state": checkpoint["state_dict"],
        "tables": {name: checkpoint[name] for name in ("pseudo_labels", "context_targets")},
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "steps": (checkpoint["epoch"], checkpoint["global_step"]),
        "history": {k: v for k, v in report["history"].items() if not k.startswith("time/")},
        "rows": rows,
    }


def unlike(first: Any, second: Any, where: str = "") -> list[str]:
    """Returns the locations at which two structures differ; tensors are compared bit by bit, and NaN equals NaN."""
    if isinstance(first, torch.Tensor):
        same = first.shape == second.shape and torch.allclose(first, second, 0, 0, equal_nan=True)
        return [] if same else [where]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{where}: {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [found for key in first for found in unlike(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            only = (
                [str(x)[:300] for x in (*first, *second) if x not in first or x not in second]
                if "rows" in where
                else ""
            )
            return [f"{where}: {len(first)} and {len(second)} {only}"]
        return [
            found for i, pair in enumerate(zip(first, second, strict=True)) for found in unlike(*pair, f"{where}/{i}")
        ]
    return [] if first == second or (first != first and second != second) else [f"{where}: {first} and {second}"]
