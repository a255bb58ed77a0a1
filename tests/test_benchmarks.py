"""Benchmarks run with tiny sizes and measure all rows of their tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

ECONOMIES = [
    "channels-last, float32",
    "batch norms folded, float32",
    "channels-last, bfloat16",
    "batch norms folded, bfloat16",
    "half-precision autocast",
    "one pass for labeled and unlabeled",
    "prompts truncated after the last end token",
    "custom blocks: no transposes, only end tokens in the last block",
    "QuickGELU folded into the layers around it",
    "no padding, and the start token encoded once",
    "both prompt sets in one pass",
    "shared prompts: shared words encoded once",
    "decoder: shared queries projected once",
    "decoder: dropout with 16 random bits",
    "decoder without gradient",
    "text tower: attention",
    "attention pool: attention",
    "decoder: attention",
    "fused AdamW",
    "average of trainable weights, foreach",
]
MEMORY_OF_TABLE = "peak memory of the table, including paths and labels, bytes per row"
GROWTH = {
    "images": [
        "building and checking an AnnotationTable, s",
        MEMORY_OF_TABLE,
        "digest of the table, s",
        "finding shared images with n / 100 test images, s",
        "drawing and holding out a split, s",
        "saving and loading a split, s",
        "first batch of an epoch, s",
        "draws per second",
    ],
    "classes": [
        "text, class-specific prompts, forward, s",
        "text, class-specific prompts, forward and backward, s",
        "text, shared prompts, forward, s",
        "text, shared prompts, forward and backward, s",
        "decoder, 4 images, forward and backward, s",
        "thresholds and pseudo-labels, 20,000 images, s",
        "co-occurrence and partition, 10,000 images, s",
        "MultilabelReport.compute, 10,000 images, s",
    ],
    "prompts": [
        "text, class-specific prompts, forward and backward, s",
        "text, shared prompts, forward and backward, s",
    ],
    "ranks": [
        "all-reduce of the epoch's scores, s",
        "memory of each process for the scores, bytes",
        "bytes sent by each process in a ring",
    ],
}


def tables(script: str, arguments: str) -> list[dict[str, list[str]]]:
    """Runs a benchmark and returns its tables, each of which maps the label of a row to the other cells."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = [part.splitlines()[2:] for part in done.stdout.split("\n\n") if part.startswith("| ")]
    rows = [[line.strip("| ").split(" | ") for line in part] for part in parts]
    return [{label: cells for label, *cells in part} for part in rows]


@pytest.mark.slow
def test_economies():
    (table,) = tables("economies.py", "--tower tiny --data VOC --batch 2 --rounds 1 --device cpu")
    assert list(table) == ECONOMIES
    assert all(float(ratio) > 0 for _, _, ratio in table.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="growth.py reads memory usage from /proc")
def test_growth():
    sizes = "--images 1000 2000 100000 --table-classes 3 --classes 6 --lengths 1 --ranks 2"
    found = tables("growth.py", sizes)
    assert [list(table) for table in found] == list(GROWTH.values())
    images = found[0]
    assert float(images["digest of the table, s"][-1]) > 0
    assert all(float(cell.replace(",", "")) >= 0 for cell in images.pop(MEMORY_OF_TABLE)[:-1])
    for table in found:
        for label, (*cells, _) in table.items():
            for cell in cells:
                value = cell.partition(" (")[0].replace(",", "")
                assert value != "–", f"{label} was not measured"
                assert float(value) > 0
