"""Estimates the duration of a run on several GPUs from measured times of its parts, without measuring a run.

    uv run python benchmarks/cluster_cost.py

The script counts steps and scored images with ``run_time.estimate``, like ``cbsa check --time``, and prints a Markdown
table. All constants are measurements or assumptions. docs/how_to/several_gpus.md discusses the result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from measuring import markdown

from cbsa_lightning.data.batch_sizes import default_labeled_per_batch, default_warmup_batch_size, steps_per_epoch
from cbsa_lightning.data.checks.run_time import Units, estimate
from cbsa_lightning.data.plan import Plan, Stage
from cbsa_lightning.data.splits import Split

GPUS = (1, 8, 64)
CLASSES, LABELED, BATCH = 80, 0.05, 64
WARMUP_EPOCHS, EPOCHS, VALIDATED_EVERY = 8, 40, 4  # configs/methods/cbsa.yaml, configs/hardware/gpu.yaml


class Part(NamedTuple):
    """Milliseconds of a part of a training step on one GPU, as a linear function of the number of images."""

    fixed: float
    per_image: float = 0.0

    def ms(self, images: int) -> float:
        """Returns the milliseconds for a number of images."""
        return self.fixed + self.per_image * images


def line(at_8: float, at_64: float) -> Part:
    """Returns the part that takes the given milliseconds *per image* in batches of 8 and 64 images."""
    per_image = (64 * at_64 - 8 * at_8) / (64 - 8)
    return Part(8 * (at_8 - per_image), per_image)


# Measured on an H200 in single rounds on 2026-11-27, by a version of step.py whose results are no longer in RESULTS.md:
# rows VOC:RN50:8 and COCO:RN50:64 (commit 7426218). Replace them when scripts/on_gpu.sh has measured a step. Batches of
# 8 were measured with 20 classes, so the fixed part of the decoder may be too small.
DIVIDED = {"tower": line(0.50, 0.11), "pool": line(0.26, 0.04), "decoder": line(0.98, 0.13)}
# Each process encodes all prompts and updates all trained weights.
REPEATED = {"text": Part(64 * 0.24), "optimizer and average": Part(64 * 0.03), "rest": Part(64 * 0.19)}

# Milliseconds per image in batches of 64 without gradients: the tower; the pool and the decoder ("decoder without
# gradient" in RESULTS.md). The pool includes its backward pass.
TOWER_MS, HEAD_MS = 0.11, 0.04 + 2.7 / 64

# Milliseconds of one CPU core per image, measured by loader.py: weak and strong view from the image cache, and filling
# this cache.
WEAK_MS, STRONG_MS, FILL_MS = 0.14, 1.14, 1000 / 149
THRESHOLD_NS = 11.8  # per score on one CPU core, measured by thresholds.py

# These values are assumptions and were not measured.
CORES = 16  # per GPU, all used by loader workers
NODE = 8  # GPUs per node
NODE_GBS, NETWORK_GBS = 200.0, 25.0  # GB/s that a GPU sends within a node and between nodes
TRAINED = 41.3e6  # weights of CBSA with RN50 and 80 classes (counted); their gradients are float32


def step_ms(batch: int, gpus: int) -> float:
    """Returns the milliseconds of a training step of ``batch`` images in total, without waiting for images."""
    images = -(-batch // gpus)
    computing = sum(part.ms(images) for part in (*DIVIDED.values(), *REPEATED.values()))
    return computing + all_reduce_ms(4 * TRAINED, gpus)


def all_reduce_ms(size: float, gpus: int) -> float:
    """Returns the milliseconds to sum ``size`` bytes over all GPUs in a ring, without overlap with the computation."""
    rate = NODE_GBS if gpus <= NODE else NETWORK_GBS
    return 2 * (gpus - 1) / gpus * size / (1e6 * rate)


def plan(images: int, validated: int, batch: int, gpus: int) -> Plan:
    """Returns the plan of a run with the default batch sizes, and at least one image per GPU and step in each stage."""
    labeled = int(LABELED * images)
    of_batch = default_labeled_per_batch(LABELED, batch)
    # The default for the warm-up does not grow with the batch.
    warmup = max(default_warmup_batch_size(LABELED, BATCH) * batch // BATCH, gpus)
    return Plan(
        split=Split(np.arange(labeled), np.arange(labeled, images), fraction=LABELED),
        images=images,
        test_images=validated,
        validated_on="test images",
        validated=validated,
        validated_classes=CLASSES,
        warmup=Stage(steps_per_epoch(labeled, warmup), warmup, 0, WARMUP_EPOCHS),
        second=Stage(steps_per_epoch(images - labeled, batch - of_batch), of_batch, batch - of_batch, None),
    )


def units(run: Plan, gpus: int) -> Units:
    """Returns the seconds per unit of work of all GPUs together, with an image cache and without a feature cache."""
    sizes = {stage.labeled + stage.unlabeled for stage in (run.warmup, run.second)}
    return Units(
        trains=True,
        frozen=True,
        cached=False,
        strong_views=0,
        evidence=False,
        labels_once=False,
        warmup_epochs=WARMUP_EPOCHS,
        max_epochs=EPOCHS,
        validated_every=VALIDATED_EVERY,
        loaders=CORES * gpus,
        overlaps=True,
        images=0,
        steps=0,
        read=0.0,  # included in the views, which are computed from the image cache
        plain=WEAK_MS / 1000,
        strong=STRONG_MS / 1000,
        tower=TOWER_MS / 1000 / gpus,
        head=HEAD_MS / 1000 / gpus,
        step={size: step_ms(size, gpus) / 1000 for size in sizes},
    )


class Hours(NamedTuple):
    """Modeled hours of the parts of a run."""

    filling: float
    steps: float
    passes: float
    thresholds: float

    @property
    def total(self) -> float:
        """Hours of the run."""
        return sum(self)


def hours(images: int, validated: int, gpus: int, batch: int = BATCH) -> Hours:
    """Returns the modeled hours of a run.

    Args:
        images: Number of training images.
        validated: Number of validation images.
        gpus: Number of GPUs.
        batch: B, the number of images per step over all GPUs.
    """
    run = plan(images, validated, batch, gpus)
    found = estimate(run, units(run, gpus))
    # The first process of each node fills the image cache with its own workers.
    filling = (images + validated) * FILL_MS / 1000 / CORES
    # Each process computes all thresholds, after the scores of all processes have been summed.
    scores = len(run.split.unlabeled) * CLASSES
    once = scores * THRESHOLD_NS / 1e9 + all_reduce_ms(4 * scores, gpus) / 1000
    times = EPOCHS - WARMUP_EPOCHS + 1
    return Hours(*(seconds / 3600 for seconds in (filling, found.steps, found.passes, times * once)))


def rows() -> list[list[str]]:
    """Returns the rows of the table."""
    lines = []
    for name, images in (("COCO, 82,081 images", 82_081), ("10 million images", 10_000_000)):
        for scaling, batches in (("strong", [BATCH] * len(GPUS)), ("weak", [BATCH * gpus for gpus in GPUS])):
            for gpus, batch in zip(GPUS, batches, strict=True):
                if scaling == "weak" and gpus == 1:
                    continue  # the same run
                found = hours(images, 40_137, gpus, batch)
                ms = step_ms(batch, gpus)
                parts = [*found, found.total, gpus * found.total]
                head = [name, "–" if gpus == 1 else scaling, f"{gpus}", f"{batch:,}", f"{ms:.1f}"]
                lines.append(head + [f"{part:,.2f}" if part < 10 else f"{part:,.0f}" for part in parts])
    return lines


if __name__ == "__main__":
    print(
        markdown(
            [
                *("data", "scaling", "GPUs", "B", "ms per step", "filling the image cache, h", "steps, h"),
                *("passes, h", "thresholds, h", "total, h", "GPU hours"),
            ],
            rows(),
        )
    )
