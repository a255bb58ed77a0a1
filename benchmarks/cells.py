"""Shared code of the benchmarks on unlabeled images: two data sets, training of a cell, and a file of results.

*digits* are the embedded canvases. *photos* are the photographs in ``--photos``, in the VOC layout. Features of the
frozen tower, including those of strong views, are cached in ``--out``, so that training does not run the tower.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch

from cbsa_lightning import CBSAModule, SSMLLDataModule, SSMLLModule
from cbsa_lightning.data.augmentations import CutoutRandAugment
from cbsa_lightning.data.batch_sizes import default_labeled_per_batch
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.data.readers.voc import VOC

torch.set_num_threads(1)  # allows two cells to run in parallel, each on one core

LABELED_PER_BATCH = 16  # in runs that do not use CAP's fraction of labeled images
COUNTED = 5  # minimum number of test positives of a class to be included in mAP

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Cell(NamedTuple):
    """A sample of labeled images: data set ("digits" or "photos"), labeled fraction p, and seed."""

    data: str
    share: float
    seed: int


class Settings(NamedTuple):
    """Settings of a data set: epochs of both stages, batch size, cached strong views, and arguments of the module."""

    warmup: int
    epochs: int
    batch: int
    strong_views: int
    model: dict[str, Any]


SETTINGS = {
    "digits": Settings(30, 6, 48, 8, {"clip": "embedded", "prompt_length": 4, "decoder_feedforward": 256}),
    "photos": Settings(8, 4, 64, 16, {}),
}
CONTEXTS = {"digits": 3, "photos": 2}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for images, features and results")
    parser.add_argument("--data", nargs="+", default=["digits"], choices=list(SETTINGS))
    parser.add_argument("--photos", help="folder that contains VOCdevkit")
    parser.add_argument("--clip", help="open_clip folder or name for the photographs")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--drawing", type=int, default=0, help="seed of the canvases (7 was used to choose settings)")
    parser.add_argument("--only", nargs="*", help="names of the runs; default: all")
    return parser


def make_data(cell: Cell, args: argparse.Namespace, labeled: int | None = None, **changes: Any) -> SSMLLDataModule:
    """Builds the data module of a cell; ``labeled`` changes the labeled images per step, but not the unlabeled ones."""
    size = SETTINGS[cell.data].batch
    caps = default_labeled_per_batch(cell.share, size)
    labeled = caps if labeled is None else labeled
    common: dict[str, Any] = {
        "labeled_fraction": cell.share,
        "seed": cell.seed,
        "batch_size": labeled + size - caps,
        "labeled_per_batch": labeled,
        "num_workers": 0,
        "feature_cache": FeatureCache(str(args.out / f"features-{cell.data}"), SETTINGS[cell.data].strong_views, 100.0),
    }
    if cell.data == "digits":
        source = Digits(root=str(args.out / "digits"), seed=args.drawing)
        own = {"image_size": 160, "strong_view": CutoutRandAugment(0.25), "warmup_batch_size": 16}
        return SSMLLDataModule(source, **{**own, **common, **changes})
    return SSMLLDataModule(VOC(args.photos), **{**common, **changes})


def make_module(cell: Cell, args: argparse.Namespace, data: SSMLLDataModule, **changes: Any) -> CBSAModule:
    """Builds the untrained module of a cell; its initial weights depend only on the cell and the ``changes``."""
    L.seed_everything(cell.seed, verbose=False)
    settings = SETTINGS[cell.data]
    own = {"warmup_epochs": settings.warmup, "ema_decay": 0.98, "num_contexts": 0, **settings.model}
    if cell.data == "photos":
        own["clip"] = args.clip
    return CBSAModule(data.class_names, prompt_names=data.prompt_names, **{**own, **changes})


def trainer_settings(cell: Cell) -> dict[str, Any]:
    """Returns arguments of a Trainer that runs on the CPU, writes no files, and validates once at the end."""
    total = SETTINGS[cell.data].warmup + SETTINGS[cell.data].epochs
    return {
        "max_epochs": total,
        "accelerator": "cpu",
        "precision": "bf16-mixed",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "check_val_every_n_epoch": total,
    }


def train(cell: Cell, module: SSMLLModule, data: SSMLLDataModule, **changes: Any) -> dict[str, Any]:
    """Trains and tests; returns mAP in %, AP of each class, quality of the pseudo-labels, and CPU time in seconds."""
    begun = time.process_time()
    trainer = L.Trainer(**{**trainer_settings(cell), **changes})
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ap = {name: metrics[f"val/AP/{name}"] for name in data.class_names}
    pseudo = {k.removeprefix("pseudo/"): v for k, v in metrics.items() if k.startswith("pseudo/")}
    return {"mAP": counted_map(ap, data), "AP": ap, "pseudo": pseudo, "seconds": time.process_time() - begun}


def counted_map(ap: dict[str, float], data: SSMLLDataModule) -> float:
    """Returns the mAP in % over the classes with at least :data:`COUNTED` test positives."""
    table = data.eval_table()
    positives = (table.labels == 1).sum(0)
    return 100 * float(np.mean([ap[n] for n, p in zip(table.class_names, positives, strict=True) if p >= COUNTED]))


class Results:
    """A file of finished runs with one JSON object per line. Runs in the file are not repeated."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        """Opens the file and checks that the folder has no runs with other options."""
        self.file = args.out / name
        args.out.mkdir(parents=True, exist_ok=True)
        for data in args.data:
            file = args.out / f"options-{data}.json"
            mine = {"drawing": args.drawing} if data == "digits" else {"clip": args.clip}
            if not file.exists():
                file.write_text(json.dumps(mine))
            if (there := json.loads(file.read_text())) != mine:
                raise SystemExit(f"{file} was written with {there}, but this run uses {mine}. Choose another --out.")

    def read(self) -> list[dict[str, Any]]:
        """Returns all finished runs."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def has(self, name: str, cell: Cell) -> bool:
        """Returns whether the file contains this run."""
        return any((r["run"], *(r[f] for f in Cell._fields)) == (name, *cell) for r in self.read())

    def add(self, name: str, cell: Cell, figures: dict[str, Any]) -> None:
        """Appends a finished run and prints its mAP."""
        with self.file.open("a") as file:
            file.write(json.dumps({"run": name, **cell._asdict(), **figures}) + "\n")
        print(f"{cell.data} p={cell.share} seed={cell.seed} {name}: mAP {figures['mAP']:.2f}", flush=True)


def mean_and_error(values: Iterable[float]) -> str:
    """Returns mean and standard error of the mean as text."""
    found = np.array(list(values))
    if len(found) < 2:
        return f"{found.mean():.1f}" if len(found) else "not run"
    return f"{found.mean():.1f} ± {found.std(ddof=1) / len(found) ** 0.5:.1f}"


def cells(args: argparse.Namespace) -> list[Cell]:
    """Returns the requested cells."""
    return [Cell(d, p, s) for d in args.data for p in args.shares for s in args.seeds]
