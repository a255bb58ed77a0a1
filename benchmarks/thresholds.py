"""Measures time and memory of class-wise thresholds, and how both grow with the number of images and classes.

    uv run python benchmarks/thresholds.py [--images 100000 ...] [--classes 20 ...] [--max-gb 12] [--out FILE]

Two algorithms compute the same thresholds on the CPU:

- *sort*: sorts each class completely; implemented here for comparison.
- *select*: ``class_thresholds`` on float32 scores.

Each cell runs in a separate process. Time is the minimum of up to three repeats (no repeat starts after ``--patience``
seconds) because other processes may use the machine. Memory is the growth of the peak memory of the process since the
scores were created (``VmHWM`` of Linux's ``/proc``, because ``getrusage`` includes the peak of the parent). The results
of *sort* and *select* are compared.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measuring import markdown, where

from cbsa_lightning.method.thresholds import class_thresholds

REPEATS = 3
# Peak memory in bytes per score: the score and, for the sort, a transposed copy, the sorted values and their indices.
BYTES = {"sort": 4 + 4 + 4 + 8, "select": 4}


def positives(num_classes):
    """Returns the number of positives of each class per thousand images, from rare to common."""
    return torch.linspace(1, 300, num_classes, dtype=torch.float64).long()


def rates(num_classes):
    return positives(num_classes).double() / 1000


def new_scores(n, num_classes):
    """Returns random scores, mostly low; created in place, so that the peak memory is that of the scores."""
    return torch.empty(n, num_classes).uniform_().square_()


def by_sort(scores):
    """Returns both thresholds if both etas are 1, for at least a thousand images."""
    if not torch.isfinite(scores).all():
        raise ValueError("scores are not finite")
    ascending = scores.T.contiguous().sort(dim=1).values
    place = len(scores) - positives(scores.shape[1])[:, None] * len(scores) // 1000
    return ascending.gather(1, place)[:, 0], ascending.gather(1, place - 1)[:, 0]


def peak():
    """Returns the peak memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def least(call, patience):
    """Returns the minimum duration of a few calls in seconds."""
    seconds = [timed(call)]
    while len(seconds) < REPEATS and sum(seconds) < patience:
        seconds.append(timed(call))
    return min(seconds)


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_held(way, n, num_classes, patience):
    def by_selection(scores):
        return class_thresholds(scores, rates(num_classes), 1.0, 1.0)

    thresholds = by_sort if way == "sort" else by_selection
    thresholds(new_scores(1000, num_classes))  # the first call loads code
    scores = new_scores(n, num_classes)
    found = []
    before = peak()
    seconds = least(lambda: found.append(thresholds(scores)), patience)
    beyond = peak() - before
    if way == "sort":
        for one, other in zip(found[0], by_selection(scores), strict=True):
            assert torch.equal(one, other)
    return seconds, beyond


def measure(way, n, num_classes, patience, threads):
    """Returns seconds and additional MiB of one cell."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return measure_held(way, n, num_classes, patience)


def alone(*args):
    """Runs :func:`measure` in a new fork of this process, which has done nothing except imports."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(measure, *args).result()


def left_out(way, n, num_classes, args):
    """Returns the reason why a cell is not measured, or an empty string."""
    gigabytes = BYTES[way] * n * num_classes / 1e9
    if gigabytes > args.max_gb:
        return f"needs {gigabytes:.1f} GB, more than --max-gb {args.max_gb:g}"
    if n * num_classes > args.max_scores:
        return f"has {n * num_classes:.0e} scores, more than --max-scores {args.max_scores:.0e}, which takes minutes"
    return ""


def exponent(sizes, seconds):
    """Returns the slope of log time over log size as text; 1 is linear."""
    return f"{np.polyfit(np.log(sizes), np.log(seconds), 1)[0]:.2f}" if len(sizes) > 1 else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 80, 200, 1000])
    parser.add_argument("--max-gb", type=float, default=12.0, help="skip cells that need more memory")
    parser.add_argument("--max-scores", type=float, default=2e9, help="skip cells with more scores")
    parser.add_argument("--patience", type=float, default=3.0, help="seconds after which no repeat starts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="file for the report")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cells, reasons = {}, []
    for n, num_classes, way in itertools.product(args.images, args.classes, BYTES):
        if reason := left_out(way, n, num_classes, args):
            reasons.append(f"- {way}, n = {n:,}, C = {num_classes}: {reason}")
            continue
        cells[way, n, num_classes] = alone(way, n, num_classes, args.patience, args.threads)
        print(way, n, num_classes, *(f"{x:.3f}" for x in cells[way, n, num_classes]), flush=True)
    text = report(args, cells, reasons)
    print("\n" + text)
    if args.out:
        args.out.write_text(text + "\n")


def report(args, cells, reasons):
    nothing = (math.nan, math.nan)
    rows = []
    for n, num_classes in itertools.product(args.images, args.classes):
        found = [cells.get((way, n, num_classes), nothing) for way in BYTES]
        numbers = [f"{seconds:.3g}" for seconds, _ in found]
        numbers += [f"{seconds / n / num_classes * 1e9:.1f}" for seconds, _ in found]
        numbers += [f"{beyond:.0f}" for _, beyond in found]
        rows.append([f"{n:,}", num_classes, *("" if number == "nan" else number for number in numbers)])
    units = ("s", "ns per score", "additional MiB")
    header = ["n", "C", *(f"{way}, {unit}" for unit in units for way in BYTES)]
    growth = []
    for way in BYTES:
        over_n = [[(n, cells[way, n, c][0]) for n in args.images if (way, n, c) in cells] for c in args.classes]
        over_c = [[(c, cells[way, n, c][0]) for c in args.classes if (way, n, c) in cells] for n in args.images]
        growth.append([way, *(exponent(*zip(*pairs, strict=True)) if pairs else "" for pairs in over_n + over_c)])
    growth_header = ["exponent", *(f"n, C = {c}" for c in args.classes), *(f"C, n = {n:,}" for n in args.images)]
    parts = [f"numpy {version('numpy')}; {where()}", markdown(header, rows), markdown(growth_header, growth)]
    if reasons:
        parts.append("Skipped:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
