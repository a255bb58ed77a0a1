"""Measures whole epochs of the second stage: loading, the pass for thresholds, training steps and validation.

    uv run python benchmarks/epoch.py [--train 5717] [--test 5823] [--variants "no caches" "caches"] [--out FILE.md]

By default, the data set has the size of PASCAL VOC 2012, and a batch has 8 images. The images are copies of a few
generated photograph-like images of 640 x 480 pixels. The files of the copies differ only in bytes after the end of the
image, so that the caches treat them as different images. The weights are random. Caches are filled before the first
epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from loader import write_photographs
from measuring import markdown, settle, where
from workload import TOWERS, Workload

from cbsa_lightning import SSMLLDataModule
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.readers import Source
from cbsa_lightning.data.readers.voc import VOC_CLASSES

ORIGINALS = 32
PHASES = ("before the epoch", "before its first step", "steps", "thresholds of the next epoch", "validation")


class Variant(NamedTuple):
    """Options of a run. To measure another option of the library, add a variant."""

    caches: bool
    strong_views: int = 0
    compiled: bool = False
    epochs: int = 1


VARIANTS = {
    "no caches": Variant(caches=False),
    "caches": Variant(caches=True, epochs=2),
    "caches, 8 strong views": Variant(caches=True, strong_views=8, epochs=2),
    "caches, compiled towers": Variant(caches=True, compiled=True),
}


class Generated(Source):
    """Generated images with random labels of VOC's classes."""

    class_names = prompt_names = VOC_CLASSES

    def __init__(self, folder: Path, train: int, test: int) -> None:
        self.folder, self.numbers = folder, {"train": train, "test": test}

    def prepare(self) -> None:
        originals = self.folder / "originals"
        if originals.exists():
            return
        originals.mkdir(parents=True)
        write_photographs(originals, ORIGINALS)
        content = [file.read_bytes() for file in sorted(originals.iterdir())]
        for part, number in self.numbers.items():
            (self.folder / part).mkdir()
            for i in range(number):
                (self.folder / part / f"{i}.jpg").write_bytes(content[i % ORIGINALS] + f"{part} {i}".encode())

    def train(self) -> AnnotationTable:
        return self._table("train")

    def test(self) -> AnnotationTable:
        return self._table("test")

    def _table(self, part: str) -> AnnotationTable:
        number = self.numbers[part]
        labels = (np.random.default_rng(0).random((number, len(VOC_CLASSES))) < 0.1).astype(np.int8)
        paths = np.array([f"{part}/{i}.jpg" for i in range(number)], np.dtypes.StringDType())
        return AnnotationTable(self.folder, paths, labels, VOC_CLASSES)


class Phases(L.Callback):
    """Measures the seconds of the phases of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def _mark(self, module: Any, phase: int) -> None:
        settle(module.device.type)
        now = time.perf_counter()
        self.epochs[-1][PHASES[phase]] = now - self.last
        self.last = now

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append({})
        self._mark(pl_module, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._mark(pl_module, 1)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._mark(pl_module, 2)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0:
            self._mark(pl_module, 3)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._mark(pl_module, 4)


def measure(name: str, folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Returns the phases of each epoch of a variant."""
    variant = VARIANTS[name]
    caches: dict[str, Any] = {}
    if variant.caches:
        caches["image_cache"] = ImageCache(str(folder / "cache"))
        caches["feature_cache"] = FeatureCache(str(folder / "cache"), variant.strong_views)
    data = SSMLLDataModule(
        Generated(folder / "images", args.train, args.test),
        image_size=TOWERS[args.tower][1],
        labeled_fraction=0.05,
        batch_size=args.batch,
        num_workers=args.workers,
        **caches,
    )
    module = Workload("VOC", args.tower, args.batch).module()
    module.tells_limits = False  # disables the passes that explain the results of a run
    if variant.compiled:
        module.network.clip.tower.compile()
        module.network.clip.text.compile()
    phases = Phases()
    trainer = L.Trainer(
        max_epochs=variant.epochs,
        devices=1,
        precision=args.precision,
        callbacks=[phases],
        logger=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return phases.epochs


def report(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns a table with a row for each epoch."""
    rows = []
    for name, epochs in results.items():
        for i, epoch in enumerate(epochs):
            each = [epoch[phase] for phase in PHASES]
            rows.append([name, str(i + 1), *(f"{seconds:.1f}" for seconds in (*each, sum(each)))])
    return markdown(["variant", "epoch", *(f"{phase}, s" for phase in PHASES), "total, s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--train", type=int, default=5717, help="number of training images")
    parser.add_argument("--test", type=int, default=5823, help="number of test images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tower", choices=list(TOWERS), default="RN50")
    parser.add_argument("--precision", default="16-mixed" if gpu else "bf16-mixed")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["no caches", "caches"])
    parser.add_argument("--out", type=Path, help="Markdown file; the measurements are written next to it as JSON")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    with TemporaryDirectory(prefix="cbsa-epoch-") as folder:
        for name in args.variants:  # files are written after each variant, so that an interrupted run loses only one
            results[name] = measure(name, Path(folder), args)
            text = (
                f"{where('cuda' if gpu else 'cpu')}. {args.train} training and {args.test} test images, batches of "
                f"{args.batch}, {args.tower}, {args.precision}, {args.workers} workers; load average at the end "
                f"{os.getloadavg()[0]:.1f}.\n\n{report(results)}\n"
            )
            if args.out:
                args.out.write_text(text)
                args.out.with_suffix(".json").write_text(json.dumps(results))
    print(text)


if __name__ == "__main__":
    main()
