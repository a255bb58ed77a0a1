"""Zero-shot, labelled-only, CBSA without contexts and CBSA on a folder of real images in the VOC layout.

    uv run python benchmarks/real_images.py --root DIR --clip DIR_OR_TAG --out DIR

The frozen tower is run once: weak views (both flips), test images, and a fixed number of strong views an image are
kept as half-precision maps below the attention pool, and all runs share them. Each strong view that training asks for
is then one of those few, drawn by (seed, epoch, visit, index). All else is the library's own training loop.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from tqdm.auto import tqdm

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.comparison import zero_shot_report
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.readers.voc import VOC
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.views import PlainView, StrongView
from cbsa_lightning.labelers import LabelledOnly

METHODS = ("labelled-only", "CBSA without contexts", "CBSA")


def compute_features(clip, table, views, path, batch=32):
    """Half-precision features ``(n, len(views), c, h, w)`` of every image under every view, kept in a file."""
    done = path.with_suffix(".done")
    shape = tuple(clip.features(torch.zeros(1, 3, views[0][1], views[0][1], dtype=torch.uint8)).shape[1:])
    mode = "r" if done.exists() else "w+"
    store = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=(len(table), len(views), *shape))
    if done.exists():
        return store
    for start in tqdm(range(0, len(table), batch), desc=f"Features {path.stem}"):
        rows = range(start, min(start + batch, len(table)))
        images = [decode(table.file(i)) for i in rows]
        for v, (view, _) in enumerate(views):
            stack = torch.stack([view(image, i) for image, i in zip(images, rows, strict=True)])
            stack = stack.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                store[start : start + len(images), v] = clip.features(stack).float().numpy()
    store.flush()
    done.touch()
    return store


class CachedFeatures(SSMLLDataModule):
    """The data module with features in the place of images."""

    def __init__(self, train, test, weak, strong, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.maps = {"train": train, "test": test}
        self.counts = {"weak": weak, "strong": strong}

    def _loader(self, dataset, batches, collate):
        dataset = FeatureDataset(self, dataset)
        return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=0, collate_fn=collate)


class FeatureDataset(torch.utils.data.Dataset):
    """Answers a draw with one of the stored maps of the view that was asked for."""

    def __init__(self, data, dataset):
        self.data, self.dataset = data, dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw: Draw):
        name, inner = type(self.dataset.view).__name__, self.dataset
        weak, strong = self.data.counts["weak"], self.data.counts["strong"]
        if name == "PlainView":
            store, v = self.data.maps["test"], 0
        else:
            rng = np.random.default_rng([self.data.seed, draw.epoch, draw.visit, draw.index])
            store = self.data.maps["train"]
            v = rng.integers(weak) if name == "WeakView" else weak + rng.integers(strong)
        item = (torch.from_numpy(store[draw.index, v].astype(np.float32)), torch.from_numpy(inner.targets[draw.index]))
        if inner.labelled is None:
            return (*item, draw.index)
        return (*item, draw.index, bool(inner.labelled[draw.index]))


def one_run(method, share, seed, args, maps):
    """Trains one cell; gives mAP over classes with enough test positives, minutes, and the last logged metrics."""
    L.seed_everything(seed)
    data = CachedFeatures(
        *maps, 2, args.strong, VOC(str(args.root)), labelled_fraction=share, seed=seed, batch_size=64, num_workers=0
    )
    module = CBSAModule(
        data.class_names,
        clip=str(args.clip),
        num_contexts=2 if method == "CBSA" else 0,
        labeler=LabelledOnly() if method == "labelled-only" else None,
        warmup_epochs=args.warmup,
        ema_decay=args.ema,
    )
    module.network.features = lambda features: features  # they come precomputed
    trainer = L.Trainer(
        max_epochs=args.warmup + args.epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=args.warmup + args.epochs,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    minutes = (time.perf_counter() - start) / 60
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return counted_map({n: metrics[f"val/AP/{n}"] for n in data.class_names}, data.test_table), minutes, metrics


def counted_map(ap, table, least=5):
    """mAP in % over the classes with at least ``least`` test positives."""
    positives = (table.labels == 1).sum(0)
    return 100 * float(np.mean([ap[n] for n, p in zip(table.class_names, positives, strict=True) if p >= least]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds VOCdevkit")
    parser.add_argument("--clip", required=True, help="open_clip folder or name")
    parser.add_argument("--out", type=Path, required=True, help="folder for features and results")
    parser.add_argument("--cells", nargs="+", default=["0.05:1", "0.1:1", "0.2:1", "0.05:2", "0.05:3"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--strong", type=int, default=4, help="stored strong views an image")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the second stage")
    parser.add_argument("--ema", type=float, default=0.98)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    clip = FrozenCLIP.load(str(args.clip))
    clip.tower.to(memory_format=torch.channels_last)
    source = VOC(str(args.root))
    plain, strong = PlainView(224), StrongView(224, seed=1)
    views = [
        (lambda image, i: plain(image), 224),
        (lambda image, i: plain(image).flip(-1), 224),
        *((lambda image, i, v=v: strong(image, Draw(i, v, 0)), 224) for v in range(args.strong)),
    ]
    train = compute_features(clip, source.train(), views, args.out / f"train{args.strong}.npy")
    test = compute_features(clip, source.test(), views[:1], args.out / "test.npy")

    data = CachedFeatures(train, test, 2, args.strong, source, labelled_fraction=0.05, num_workers=0)
    data.setup("validate")
    features, clip.features = clip.features, lambda maps: maps
    report = zero_shot_report(clip, data)
    clip.features = features
    zero = counted_map(dict(zip(data.class_names, report["AP"].tolist(), strict=True)), data.test_table)
    print(f"zero-shot {zero:.1f}", flush=True)

    results = args.out / "results.csv"
    finished = {tuple(row[:3]) for row in csv.reader(results.open())} if results.exists() else set()
    for cell in args.cells:
        share, seed = cell.split(":")
        for method in args.methods:
            if (method, share, seed) in finished:
                continue
            score, minutes, metrics = one_run(method, float(share), int(seed), args, (train, test))
            extra = [f"{metrics.get(k, float('nan')):.3f}" for k in ("pseudo/precision", "pseudo/recall", "pseudo/CF1")]
            with results.open("a", newline="") as file:
                csv.writer(file).writerow([method, share, seed, f"{score:.2f}", f"{minutes:.2f}", *extra])
            print(f"{method} p={share} seed={seed}: mAP {score:.2f}, {minutes:.1f} min, pseudo {extra}", flush=True)


if __name__ == "__main__":
    main()
