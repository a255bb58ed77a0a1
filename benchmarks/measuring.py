"""Shared code of the benchmarks: description of the machine, and Markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from cbsa_lightning.reproduce.results import markdown as markdown  # re-exported


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
