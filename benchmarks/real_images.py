"""Compares zero-shot CLIP, labeled-only training, CBSA without contexts and CBSA on real images in the VOC layout.

    uv run python benchmarks/real_images.py --root DIR --clip DIR_OR_TAG --out DIR [--caches none 0 4 16]

``--caches`` sets the source of frozen features: ``none`` computes them from the images each time. A number m caches the
weak views and m strong views per image, which replace new strong views (0: strong views are always new). Features are
cached in ``--out`` and shared by all runs. The results include the minutes for reading or computing the features.
Finished runs are read from ``results.csv`` and not repeated.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from measuring import where

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.readers.voc import VOC
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.metrics import MultilabelReport
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP

METHODS = ("labeled-only", "CBSA without contexts", "CBSA")


class Minutes(L.Callback):
    """Measures the minutes before the first epoch (features) and of training, including all passes.

    The times are CPU times, which exclude other processes. With one thread and without workers, they equal the elapsed
    time on an idle core.
    """

    def setup(self, trainer, pl_module, stage):
        self.begun = time.process_time()

    def on_train_start(self, trainer, pl_module):
        self.features = (time.process_time() - self.begun) / 60

    def on_fit_end(self, trainer, pl_module):
        self.training = (time.process_time() - self.begun) / 60 - self.features


def make_data(share, seed, cache, args):
    features = None if cache == "none" else FeatureCache(str(args.out / "cache"), int(cache), args.limit_gb)
    source = VOC(str(args.root))
    return SSMLLDataModule(
        source, labeled_fraction=share, seed=seed, batch_size=64, num_workers=args.workers, feature_cache=features
    )


def one_run(method, share, seed, cache, args):
    """Trains one run; returns mAP in %, minutes, and the last logged metrics."""
    L.seed_everything(seed)
    data = make_data(share, seed, cache, args)
    module = CBSAModule(
        data.class_names,
        clip=str(args.clip),
        num_contexts=2 if method == "CBSA" else 0,
        labeler=LabeledOnly() if method == "labeled-only" else None,
        warmup_epochs=args.warmup,
        ema_decay=args.ema,
    )
    minutes = Minutes()
    trainer = L.Trainer(
        max_epochs=args.warmup + args.epochs,
        accelerator="cpu",
        precision=args.precision,
        callbacks=[minutes],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        check_val_every_n_epoch=args.validate_every or args.warmup + args.epochs,
    )
    trainer.fit(module, datamodule=data)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    score = counted_map({n: metrics[f"val/AP/{n}"] for n in data.class_names}, data.test_table)
    return score, minutes, metrics


def counted_map(ap, table, least=5):
    """Returns the mAP in % over the classes with at least ``least`` test positives."""
    positives = (table.labels == 1).sum(0)
    return 100 * float(np.mean([ap[n] for n, p in zip(table.class_names, positives, strict=True) if p >= least]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that contains VOCdevkit")
    parser.add_argument("--clip", required=True, help="open_clip folder or name")
    parser.add_argument("--out", type=Path, required=True, help="folder for features and results")
    parser.add_argument("--cells", nargs="+", default=["0.05:1", "0.1:1", "0.2:1", "0.05:2", "0.05:3"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--caches", nargs="+", default=["4"], help="none, or cached strong views per image")
    parser.add_argument("--limit-gb", type=float, default=50.0)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the second stage")
    parser.add_argument("--validate-every", type=int, default=0, help="epochs between validations; 0: at the end only")
    parser.add_argument("--ema", type=float, default=0.98)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(where())

    data = make_data(0.05, 1, "none", args)
    data.setup("validate")
    network = ZeroShotCLIP(data.prompt_names, str(args.clip))
    measure = MultilabelReport(len(data.class_names))
    with torch.no_grad():
        text = network.encode_text()
        for batch in data.val_images():
            measure.update(network(network.features(batch.images), text).logits, batch.targets)
    report = measure.compute()
    zero = counted_map(dict(zip(data.class_names, report["AP"].tolist(), strict=True)), data.test_table)
    print(f"zero-shot {zero:.1f}", flush=True)

    results = args.out / "results.csv"
    finished = {tuple(row[:4]) for row in csv.reader(results.open())} if results.exists() else set()
    runs = [(m, *cell.split(":"), cache) for cell in args.cells for m in args.methods for cache in args.caches]
    for method, share, seed, cache in runs:
        if (method, share, seed, cache) in finished:
            continue
        score, minutes, metrics = one_run(method, float(share), int(seed), cache, args)
        names = ("time/ms_per_image", "pseudo/precision", "pseudo/recall", "pseudo/CF1")
        more = [f"{metrics.get(name, float('nan')):.3f}" for name in names]
        spent = [f"{minutes.features:.2f}", f"{minutes.training:.2f}"]
        with results.open("a", newline="") as file:
            csv.writer(file).writerow([method, share, seed, cache, f"{score:.2f}", *spent, *more])
        print(f"{method} p={share} seed={seed} cache={cache}: mAP {score:.2f}, minutes {spent}, {more}", flush=True)


if __name__ == "__main__":
    main()
