"""Measures how time and memory grow with the number of images, classes, prompt words and processes.

    uv run python benchmarks/growth.py [--sections images classes prompts ranks] [--out FILE]

Each value is measured in a separate process, which is forked from this one, so that its peak memory can be measured.
The report starts with the memory of an idle process. Times are the median of three repeats, or of fewer (at least one)
if three repeats take more than three seconds. "growth" is the slope of the logarithm of the value over the logarithm of
the size, fitted to the larger half of the sizes; 1 means proportional. A process may allocate at most 70 % of the
memory that is free when it starts. If a measurement needs more, or fails, its entry is empty and the exit code is
printed to standard error. The weights are random. The script runs only on Linux because it reads memory usage from
``/proc``.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from measuring import markdown, where
from torch import distributed

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.samplers import PairedBatches
from cbsa_lightning.data.splits import Split, hold_out, split_labeled
from cbsa_lightning.method.contexts import cooccurrence, partition
from cbsa_lightning.method.labelers import ClassDistributionAware, positive_rates
from cbsa_lightning.method.metrics import MultilabelReport
from cbsa_lightning.networks.decoder import LabelDecoder
from cbsa_lightning.networks.prompts import ClassPrompts, encode_prompt_sets

MODEL = "RN50-quickgelu"
FORK = multiprocessing.get_context(
    "fork"
)  # children inherit all imports; this is safe because the parent starts no threads
MIB = 2**20


class Cell(NamedTuple):
    """A value, usually in seconds, and the peak memory in MiB; None if it was not measured."""

    value: float | None = None
    peak: float | None = None


class Row(NamedTuple):
    """A quantity, measured for all sizes of a section."""

    label: str
    cells: list[Cell]


def timed(run: Callable[[], object], repeats: int = 3, budget: float = 3.0) -> float:
    """Returns the median duration of ``run`` in seconds."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) * (1 + 1 / len(seconds)) < budget):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak() -> float:
    """Returns the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available() -> float:
    """Returns the available memory of this machine in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1024


def stay_within(share: float) -> None:
    """Limits the allocations of this process to a fraction of the free memory, to protect other processes."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + int(share * available() * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process is killed first


def apart(measure: Callable[[int], float], size: int, threads: int) -> Cell:
    """Runs ``measure(size)`` in a separate process."""

    def child() -> None:
        stay_within(0.7)
        torch.set_num_threads(threads)
        value = measure(size)
        send.send(Cell(value, peak()))

    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child)
    process.start()
    send.close()
    try:
        cell = receive.recv()
    except EOFError:
        cell = Cell()
    process.join()
    if process.exitcode:  # a process that a signal ended (negative exit code) prints no message
        print(f"size {size:,} ended with exit code {process.exitcode}", file=sys.stderr)
    return cell


@cache
def idle() -> float:
    """Returns the peak memory of an idle process in MiB."""
    return apart(lambda _: 0.0, 0, 1).peak


def sweep(label: str, measure: Callable[[int], float], sizes: Sequence[int], threads: int) -> Row:
    """Runs ``measure`` for all sizes."""
    cells = []
    for size in sizes:
        print(f"{label}: {size:,}", file=sys.stderr)
        cells.append(apart(measure, size, threads))
    return Row(label, cells)


def growth(sizes: Sequence[int], cells: Sequence[Cell]) -> str:
    """Returns the slope of log value over log size for the larger half of the sizes, as text."""
    half = len(sizes) // 2
    points = [(math.log(n), math.log(c.value)) for n, c in zip(sizes[half:], cells[half:], strict=True) if c.value]
    if len(points) < 2:
        return "–"
    return f"{statistics.linear_regression(*zip(*points, strict=True)).slope:.2f}"


def rendered(title: str, symbol: str, sizes: Sequence[int], rows: Sequence[Row]) -> str:
    """Returns a section as Markdown: values with peak memory in MiB, and their growth."""

    def text(cell: Cell) -> str:
        if cell.value is None:
            return "–"
        value = f"{cell.value:,.0f}" if cell.value >= 100 else f"{cell.value:.3g}"
        return value if cell.peak is None else f"{value} ({cell.peak:,.0f})"

    header = ["value (peak MiB)", *(f"{symbol} = {size:,}" for size in sizes), "growth"]
    body = [[row.label, *map(text, row.cells), growth(sizes, row.cells)] for row in rows]
    return f"### {title}\n\n{markdown(header, body)}"


# Images ----------------------------------------------------------------------------------------------------------


def columns(n: int, classes: int, folder: str = "train2014") -> tuple[np.ndarray, np.ndarray]:
    """Returns paths in COCO's format, and labels."""
    paths = np.empty(n, dtype=np.dtypes.StringDType())
    labels = np.empty((n, classes), dtype=np.int8)
    pattern = (np.random.default_rng(0).random((2**14, classes)) < 0.05).astype(np.int8)
    for start in range(0, n, len(pattern)):
        rows = range(start, min(n, start + len(pattern)))
        paths[start : rows.stop] = [f"{folder}/COCO_{folder}_{i:012d}.jpg" for i in rows]
        labels[start : rows.stop] = pattern[: len(rows)]
    return paths, labels


def table(paths: np.ndarray, labels: np.ndarray) -> AnnotationTable:
    """Builds a table, which includes checks of shapes, label values, and empty and repeated paths."""
    return AnnotationTable(Path("/images"), paths, labels, tuple(f"class {k}" for k in range(labels.shape[1])))


def build(classes: int, n: int) -> float:
    paths, labels = columns(n, classes)
    return timed(lambda: table(paths, labels))


def digest(classes: int, n: int) -> float:
    return timed(table(*columns(n, classes)).digest)


def leaks(classes: int, n: int) -> float:
    train, test = table(*columns(n, classes)), table(*columns(n // 100, classes, "val2014"))
    return timed(lambda: train.shared_files(test))


class Rows:
    """Stands for the table of a split. The digest of a real table is measured separately."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def digest(self) -> str:
        return "digest"


def split(n: int) -> Split:
    """Returns a split with 5 % labeled images, a fifth of which are held out."""
    return hold_out(split_labeled(n, 0.05, 1, "digest"), 0.2, 1)


def save_and_load(n: int) -> float:
    drawn, owner = split(n), Rows(n)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "split.json"

        def run() -> None:
            drawn.save(file)
            Split.load(file, owner)

        return timed(run)


def batches(n: int) -> PairedBatches:
    rows = np.arange(n)
    return PairedBatches(rows[: n // 20], rows[n // 20 :], 4, 60, seed=1)


def first_batch(n: int) -> float:
    sampler = batches(n)
    return timed(lambda: next(iter(sampler)))


def draws_a_second(n: int, most: int = 20_000) -> float:
    iterator = iter(batches(n))
    next(iterator)
    start = time.perf_counter()
    drawn = sum(len(batch) for batch in islice(iterator, most))
    return drawn / (time.perf_counter() - start)


def images(args: argparse.Namespace) -> str:
    measures = {
        "building and checking an AnnotationTable, s": partial(build, args.table_classes),
        "digest of the table, s": partial(digest, args.table_classes),
        "finding shared images with n / 100 test images, s": partial(leaks, args.table_classes),
        "drawing and holding out a split, s": lambda n: timed(lambda: split(n)),
        "saving and loading a split, s": save_and_load,
        "first batch of an epoch, s": first_batch,
        "draws per second": draws_a_second,
    }
    sizes = args.images
    rows = [sweep(label, measure, sizes, args.threads) for label, measure in measures.items()]
    room = [Cell(c.peak and max(0.0, c.peak - idle()) * MIB / n) for n, c in zip(sizes, rows[0].cells, strict=True)]
    rows.insert(1, Row("peak memory of the table, including paths and labels, bytes per row", room))
    return rendered(f"Images, {args.table_classes} classes", "n", sizes, rows)


# Classes and prompt words ----------------------------------------------------------------------------------------


def names(number: int) -> list[str]:
    """Returns words of one token each, so that the length of prompts does not depend on the number of classes."""
    words = (token.removesuffix("</w>") for token in open_clip.get_tokenizer(MODEL).encoder if token.endswith("</w>"))
    return list(islice((word for word in words if len(word) > 3 and word.isalpha() and word.isascii()), number))


def text(shared: bool, backward: bool, classes: int, length: int) -> float:
    """Measures the text features of one prompt set, with or without the gradient of its words."""
    clip = FrozenCLIP.load(MODEL, "random")
    prompts = ClassPrompts(clip, names(classes), length, shared)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            (features,) = encode_prompt_sets(clip, [prompts])
            if backward:
                features.square().mean().backward()

    return timed(run)


def decoder(classes: int, batch: int = 4) -> float:
    decoder = LabelDecoder(1024)
    queries = torch.randn(classes, 1024, requires_grad=True)
    local, places = (torch.randn(batch, 49, 1024, requires_grad=True) for _ in range(2))
    return timed(lambda: decoder(queries, local, places)[0].square().mean().backward())


def thresholds(classes: int, n: int = 20_000) -> float:
    scores, rates = torch.rand(n, classes), positive_rates(random_labels(1000, classes))
    return timed(lambda: ClassDistributionAware()(scores, rates))


def contexts(classes: int, n: int = 10_000) -> float:
    labels = random_labels(n, classes)
    return timed(lambda: partition(cooccurrence(labels), 6))


def report(classes: int, n: int = 10_000) -> float:
    metric = MultilabelReport(classes)
    for labels in random_labels(n, classes).split(500):
        metric.update(torch.randn(labels.shape), labels)

    def run() -> None:
        metric._computed = None  # torchmetrics caches the result
        metric.compute()

    return timed(run)


def random_labels(n: int, classes: int) -> torch.Tensor:
    """Returns random labels: at most three per image, more often of the first classes."""
    positions = (torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) ** 2 * classes).long()
    return torch.zeros(n, classes, dtype=torch.int8).scatter_(1, positions, 1)


def classes(args: argparse.Namespace) -> str:
    measures = {
        f"text, {mode} prompts, {passes}, s": partial(text, mode == "shared", "backward" in passes, length=16)
        for mode in ("class-specific", "shared")
        for passes in ("forward", "forward and backward")
    }
    measures |= {
        "decoder, 4 images, forward and backward, s": decoder,
        "thresholds and pseudo-labels, 20,000 images, s": thresholds,
        "co-occurrence and partition, 10,000 images, s": contexts,
        "MultilabelReport.compute, 10,000 images, s": report,
    }
    rows = [sweep(label, measure, args.classes, args.threads) for label, measure in measures.items()]
    return rendered("Classes (one prompt set of 16 words)", "C", args.classes, rows)


def prompts(args: argparse.Namespace) -> str:
    rows = [
        sweep(f"text, {mode} prompts, forward and backward, s", measure, args.lengths, args.threads)
        for mode in ("class-specific", "shared")
        for measure in [lambda length, shared=mode == "shared": text(shared, True, 80, length)]
    ]
    return rendered("Prompt words, 80 classes", "N", args.lengths, rows)


# Processes -------------------------------------------------------------------------------------------------------

SCORES = (82_081, 80)  # COCO's training images and classes


def reduce_scores(rank: int, world: int, store: str, results: multiprocessing.SimpleQueue) -> None:
    """Sums scores over processes, as callbacks/thresholds.py does once per epoch; other processes' rows are zero."""
    stay_within(0.7 / world)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    scores = torch.zeros(SCORES)

    def run() -> None:
        scores.zero_()[rank::world] = 0.5
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(scores)
        seconds.append(time.perf_counter() - start)

    seconds: list[float] = []
    for _ in range(5):
        run()
    assert bool((scores == 0.5).all())
    distributed.destroy_process_group()
    results.put(Cell(statistics.median(seconds), peak()))


def reduced(world: int) -> Cell:
    """Returns the time of the slowest process and the highest peak memory."""
    results = FORK.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        work = (world, f"{folder}/store", results)
        torch.multiprocessing.start_processes(reduce_scores, work, nprocs=world, start_method="fork")
    cells = [results.get() for _ in range(world)]
    return Cell(max(c.value for c in cells), max(c.peak for c in cells))


def ranks(args: argparse.Namespace) -> str:
    size = 4 * math.prod(SCORES)
    rows = [
        Row("all-reduce of the epoch's scores, s", [reduced(world) for world in args.ranks]),
        Row("memory of each process for the scores, bytes", [Cell(size) for _ in args.ranks]),
        Row("bytes sent by each process in a ring", [Cell(2 * size * (world - 1) / world) for world in args.ranks]),
    ]
    note = f"The processes share {os.cpu_count()} cores. With more processes than cores, they also wait for each other."
    return (
        rendered(f"Processes, scores {SCORES[0]:,} x {SCORES[1]}, gloo", "processes", args.ranks, rows) + f"\n\n{note}"
    )


SECTIONS = {"images": images, "classes": classes, "prompts": prompts, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--images", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--table-classes", type=int, default=80, help="number of classes in the table")
    parser.add_argument("--classes", nargs="+", type=int, default=[20, 80, 200, 500, 2000])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    # The default is one because several threads wait for each other if the machine is busy.
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # hides open_clip's warning about random weights
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]  # other processes would increase the measured times
    state = f"Load average before the measurement: {load:.1f}. Memory of an idle process: {idle():,.0f} MiB."
    parts = [where(), state]
    print(*parts, sep="\n\n", end="\n\n")
    for name in args.sections:
        parts.append(SECTIONS[name](args))
        print(parts[-1], end="\n\n", flush=True)
    parts.append(f"Measured in {time.perf_counter() - start:,.0f} s.")
    print(parts[-1])
    if args.out is not None:
        args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
