"""Runs the tests for a GPU and the main benchmarks, each with a time limit; see scripts/on_gpu.sh.

    bash scripts/on_gpu.sh [--parts tests step epoch table] [--tiny]

The results are written to the folder ``$OUT`` (default: runs/on_gpu). If a part fails or reaches its limit, the
tables that it has written are kept, and the other parts still run. The output of all parts is in ``log.txt``. The exit
status is 1 if a part did not pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from loader import write_photographs
from measuring import markdown
from workload import TOWERS

from cbsa_lightning.data.readers.coco import COCO_CLASSES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SYSTEMS = ("DualCoOp", "DualCoOp++", "Ours")


class Part(NamedTuple):
    """A command and its limit in seconds."""

    command: list[str]
    limit: float


def parts(out: Path, work: Path, tiny: bool) -> dict[str, Part]:
    """Returns all parts. Their limits add up to 12 minutes on a GPU."""
    slow = 5 if tiny else 1  # the test of this script must also pass on slow machines
    step, epoch = ["--out", str(out / "step.md")], ["--out", str(out / "epoch.md")]
    variants = ["no caches", "caches"]
    if tiny:
        step += ["--cells", "VOC:tiny:4", "--precisions", "bf16-mixed"]
        epoch += ["--tower", "tiny", "--train", "40", "--test", "20", "--workers", "0"]
    else:
        step += ["--parts", "--number", "10"]
        variants.append("caches, compiled towers")
    epoch += ["--variants", *variants]
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(file) for file in tests if "pytest.mark.gpu" in file.read_text()]
    pytest = ["pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", "-m", "gpu"]
    return {
        "tests": Part([sys.executable, "-m", *pytest, *marked], 80 * slow),
        "step": Part([sys.executable, str(HERE / "step.py"), *step], 230 * slow),
        "epoch": Part([sys.executable, str(HERE / "epoch.py"), *epoch], 200 * slow),
        "table": Part(table_9(work, tiny), 210 * slow),
    }


def table_9(work: Path, tiny: bool) -> list[str]:
    """Returns a command that measures the cost of a step of three systems, on the data of :func:`write_data`."""
    command = [sys.executable, "-m", "cbsa_lightning", "table", "9", "--rows", *SYSTEMS, "--shares", "0.2"]
    command += ["--data", f"generated={work / 'data.yaml'}", "--config", str(work / "short.yaml")]
    return [*command, "--clip", TOWERS["tiny" if tiny else "RN50"][0], "--pretrained", "random", "--out", str(work)]


def write_data(work: Path, tiny: bool) -> None:
    """Writes a few images with COCO's classes, and the overlays of short runs."""
    images, number = work / "images", 96
    images.mkdir(parents=True)
    write_photographs(images, number)
    labels = np.random.default_rng(0).random((number, len(COCO_CLASSES))) < 0.1
    names = (";".join(np.array(COCO_CLASSES)[shown]) or "none" for shown in labels)
    lines = [f"images/{i}.jpg,{cell}" for i, cell in enumerate(names)]
    tables = {"train": lines[:80], "test": lines[80:]}
    for part, rows in tables.items():
        (work / f"{part}.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
    gpu = torch.cuda.is_available()
    data = {
        "source": {"class_path": "Table", "init_args": {part: str(work / f"{part}.csv") for part in tables}},
        "batch_size": 64,
        "image_size": TOWERS["tiny" if tiny else "RN50"][1],
        "num_workers": 0,
    }
    trainer = {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": 1,
        "precision": "16-mixed" if gpu else "bf16-mixed",
        "max_epochs": 2,
        "limit_train_batches": 1,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
    }
    short = {"trainer": trainer, "model": {"init_args": {"warmup_epochs": 1}}, "report": {"enabled": False}}
    (work / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    (work / "short.yaml").write_text(yaml.safe_dump(short))


def run(name: str, part: Part, log: Path) -> tuple[str, float]:
    """Runs a part and returns its result, "passed" or a description of the failure, and its duration in seconds."""
    begun = time.monotonic()
    print(f"{name}: running for up to {part.limit:.0f} s", flush=True)
    with log.open("a") as file:
        file.write(f"\n===== {name}: {' '.join(part.command)}\n")
        file.flush()
        process = subprocess.Popen(part.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(part.limit)
            result = "passed" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also kills the processes that the part has started
            process.wait()
            result = f"stopped after {part.limit:.0f} s"
    return result, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["tests", "step", "epoch", "table"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--tiny", action="store_true", help="small networks and few images, to test this script")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "on_gpu").resolve()
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    if "table" in args.parts:
        write_data(work, args.tiny)
    plan = parts(out, work, args.tiny)
    rows = []
    for name in args.parts:
        result, seconds = run(name, plan[name], log)
        rows.append([name, result, f"{seconds:.0f}"])
    if (work / "table_9.md").exists():
        shutil.copy(work / "table_9.md", out)
    shutil.rmtree(work, ignore_errors=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    summary = f"{device}\n\n{markdown(['part', 'result', 'seconds'], rows)}\n"
    (out / "summary.md").write_text(summary)
    tables = [file.read_text() for name in ("step", "epoch", "table_9") if (file := out / f"{name}.md").exists()]
    failed = [row[0] for row in rows if row[1] != "passed"]
    print("\n".join([*(log.read_text()[-3000:] for _ in failed[:1]), *tables, summary]))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
