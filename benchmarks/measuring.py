"""Shared code of the benchmarks: times, description of the machine, and Markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cbsa_lightning.reproduce.results import markdown as markdown  # re-exported


class Took(NamedTuple):
    """Seconds of wall time, and of processor time over all threads of this process."""

    wall: float
    cpu: float


class Stopwatch:
    """Measures the time between its creation and :meth:`read`. Both wait for a GPU to finish its work."""

    def __init__(self, device: str) -> None:
        self.device = device
        settle(device)
        self.began = Took(time.perf_counter(), time.process_time())

    def read(self) -> Took:
        settle(self.device)
        return Took(time.perf_counter() - self.began.wall, time.process_time() - self.began.cpu)


def settle(device: str) -> None:
    """Waits until a GPU has finished all queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], device: str, number: int = 1) -> Took:
    """Returns the time per call."""
    watch = Stopwatch(device)
    for _ in range(number):
        function()
    return Took(*(seconds / number for seconds in watch.read()))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns median, minimum and maximum as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def where(device: str = "cpu") -> str:
    """Returns device, versions and date in one line."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "open_clip_torch"))
    return f"{machine}; Python {platform.python_version()}, {packages}; {datetime.date.today()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
