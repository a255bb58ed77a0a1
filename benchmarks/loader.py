"""Measures the throughput of the data module, and computes the number of cores that a training step needs.

    uv run python benchmarks/loader.py --step-ms-per-image 0.5 1 2

The script measures each step of creating a view, in one process with one thread, and ``train_dataloader`` with several
numbers of worker processes. The images come from files decoded at full size, from files decoded at reduced size
(``fast_decode``), and from the image cache. All values are medians of several repeats, and times of one core are CPU
times, because other processes may use the machine at the same time. Files and cache are in the page cache after the
first repeat, so the speed of the disk is not measured.

Without ``--images``, the images are generated: smooth noise with grain, as JPEG files of 640 x 480 pixels and quality
90, which are about as large as COCO's photographs.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import torch
from measuring import markdown, where
from PIL import Image

from cbsa_lightning import SSMLLDataModule
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.images import ImageFiles, decode
from cbsa_lightning.data.readers import Source
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.views import PlainView, StrongView, WeakView, squash

CLASSES = ("one", "other")


def write_photographs(folder: Path, number: int) -> None:
    """Writes images of noise whose amplitude decreases with frequency, as in photographs, and some grain."""
    rng = np.random.default_rng(0)
    for i in range(number):
        picture = np.full((480, 640, 3), 128.0)
        for octave in range(7):
            cells = rng.normal(0, 40 * 0.72**octave, (3 * 2**octave, 4 * 2**octave, 3)).astype(np.float32)
            for channel in range(3):
                grown = Image.fromarray(cells[..., channel]).resize((640, 480), Image.Resampling.BICUBIC)
                picture[..., channel] += np.asarray(grown)
        picture += rng.normal(0, 7, (480, 640, 1))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


class Photographs(Source):
    """The first images of a folder, with random labels."""

    class_names = prompt_names = CLASSES

    def __init__(self, folder: Path, number: int) -> None:
        table = read_images(folder, CLASSES)
        number = min(number, len(table))
        labels = np.random.default_rng(0).integers(0, 2, (number, 2)).astype(np.int8)
        self._table = AnnotationTable(table.root, table.paths[:number], labels, CLASSES)

    def prepare(self) -> None:
        """Does nothing."""

    def train(self) -> AnnotationTable:
        return self._table

    def test(self) -> None:
        return None


def rate(work, number: int, repeats: int) -> float:
    """Returns the images per second of one core: the median of ``repeats`` passes of ``work(i)`` after a first pass."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        for i in range(number):
            work(i)
        seconds.append(time.process_time() - start)
    return number / statistics.median(seconds[1:])


def steps_of_a_view(table: AnnotationTable, cached, size: int, number: int, repeats: int):
    """Returns rows (step, images per second) for one process."""
    number = min(number, len(table))
    files = [table.file(i) for i in range(number)]
    whole = [decode(file) for file in files]
    small = [squash(image, size) for image in whole]
    draws = (Draw(0, i, 0) for i in count())  # different random numbers for each view
    views = {"plain": PlainView(size), "weak": WeakView(size, 0), "strong": StrongView(size, 0)}
    work = {
        "decode, whole": lambda i: decode(files[i]),
        "decode, fast": lambda i: decode(files[i], size),
        "squash": lambda i: squash(whole[i], size),
        **{
            f"{name} view of a squashed image": lambda i, v=view: v(small[i], next(draws))
            for name, view in views.items()
        },
    }
    for origin, images in {
        "whole files": ImageFiles(table),
        "fast files": ImageFiles(table, size),
        "cache": cached,
    }.items():
        for name, view in views.items():
            work[f"{name} view from {origin}"] = lambda i, v=view, images=images: v(images[i], next(draws))
    return [(name, rate(one, number, repeats)) for name, one in work.items()]


def loader_rate(data: SSMLLDataModule, repeats: int) -> tuple[float, float]:
    """Measures the training loader after its workers have started: images per second, and CPU seconds per image."""
    started = core_seconds()
    loader = data.train_dataloader()
    rates, total = [], 0
    for epoch in range(repeats + 1):
        loader.batch_sampler.set_epoch(epoch)
        start = time.perf_counter()
        images = sum(len(batch.index) for batch in loader)
        rates.append(images / (time.perf_counter() - start))
        total += images
    del loader  # ends the workers, so that their CPU time is available
    return statistics.median(rates[1:]), (core_seconds() - started) / total


def core_seconds() -> float:
    """Returns the CPU time of this process and its finished child processes."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def need(seconds: float, milliseconds: float, cores: int, goal: float) -> list[str]:
    """Returns the required images per second of a step, the fraction of time it waits, and the cores for ``goal``."""
    wanted = 1000 / milliseconds
    waiting = max(0.0, 1 - cores / seconds / wanted)
    return [f"{wanted:.0f}", f"{100 * waiting:.0f} %", str(math.ceil((1 - goal) * wanted * seconds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; default: images are generated")
    parser.add_argument("--number", type=int, default=256, help="number of images")
    parser.add_argument("--image-size", type=int, default=224, help="side length of the views")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loader processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-ms-per-image", type=float, nargs="*", default=[], help="durations of a training step")
    parser.add_argument("--cores", type=int, default=16, help="cores of the machine with the GPU")
    parser.add_argument("--goal", type=float, default=0.1, help="maximum fraction of time that a step waits")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")

    work = Path(tempfile.mkdtemp(prefix="cbsa-loader-"))
    try:
        text = measure(args, work)
    finally:
        shutil.rmtree(work)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def measure(args: argparse.Namespace, work: Path) -> str:
    """Returns the report."""
    folder = args.images
    if folder is None:
        folder = work / "images"
        folder.mkdir()
        write_photographs(folder, args.number)
    source = Photographs(folder, args.number)
    table, size = source.train(), args.image_size
    bytes_each = statistics.mean(table.file(i).stat().st_size for i in range(len(table)))

    cache = ImageCache(str(work / "cache"))
    start = time.perf_counter()
    cached = cache.images(ImageFiles(table), size)
    filling = len(table) / (time.perf_counter() - start)

    single = steps_of_a_view(table, cached, size, 128, args.repeats)

    options = {
        "whole files": {},
        "fast files (fast_decode)": {"fast_decode": True},
        "image cache": {"image_cache": cache},
    }
    rates: dict[str, list[tuple[float, float]]] = {}
    for name, settings in options.items():
        rates[name] = []
        for workers in args.workers:
            data = SSMLLDataModule(
                source,
                image_size=size,
                labeled_fraction=0.1,
                held_out_fraction=0.0,
                batch_size=min(args.batch_size, len(table) // 2),
                num_workers=workers,
                **settings,
            )
            data.prepare_data()
            data.setup("fit")
            rates[name].append(loader_rate(data, args.repeats))

    packages = ", ".join(f"{name} {version(name)}" for name in ("pillow", "albumentations"))
    parts = [
        f"{where()}; {packages}",
        f"{len(table)} images with a mean size of {bytes_each / 1000:.0f} kB from "
        f"{args.images or 'photograph-like noise, 640 x 480, quality 90'}; views of {size} pixels; medians of "
        f"{args.repeats} repeats; load average at the end {os.getloadavg()[0]:.1f}.",
        "One core:",
        markdown(["step", "images/s", "ms per image"], [(n, f"{r:.0f}", f"{1000 / r:.2f}") for n, r in single]),
        f"Filling the cache without workers: {filling:.0f} images/s.",
        "`train_dataloader` with batches of strong views: images/s, and CPU time per image in ms over all processes in "
        "parentheses:",
        markdown(
            ["images from", *(f"{w} workers" for w in args.workers)],
            [(name, *(f"{r:.0f} ({1000 * s:.2f})" for r, s in found)) for name, found in rates.items()],
        ),
    ]
    if args.step_ms_per_image:
        cost = {name: statistics.median(s for _, s in found) for name, found in rates.items()}
        parts += [
            f"Requirements of a training step on a machine with {args.cores} cores of this type:",
            markdown(
                [
                    "step, ms per image",
                    "images from",
                    "required images/s",
                    f"waiting time with {args.cores} cores",
                    f"cores for waiting time < {100 * args.goal:.0f} %",
                ],
                [
                    (f"{ms:g}", name, *need(seconds, ms, args.cores, args.goal))
                    for ms in args.step_ms_per_image
                    for name, seconds in cost.items()
                ],
            ),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
