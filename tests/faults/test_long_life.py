"""Memory, open files, processes and threads of a run do not grow over many epochs."""

from __future__ import annotations

import gc
import json
import os
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from killing import in_a_process
from lightning.pytorch.callbacks import ModelCheckpoint

from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.training.loggers import RunLogger
from tiny_data import Squares, tiny_fit

pytestmark = pytest.mark.slow
EPOCHS, SETTLED = 200, 50
# Each epoch adds about twenty metrics to metrics.csv and to the report's history: 2 to 4 KiB of Python objects. A
# leaked batch, loader or copy of the weights has at least 30 KiB.
LEAK = 20 * 1024


class Holdings(L.Callback):
    """Records the resources of the process at the end of each epoch."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module):
        gc.collect()
        process = Path("/proc/self")
        threads = list((process / "task").iterdir())
        noted = {
            "memory": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "handles": len(list((process / "fd").iterdir())),
            "processes": sum(len((thread / "children").read_text().split()) for thread in threads),
            "threads": len(threads),
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(noted) + "\n")


def long_run(folder: Path, clip: Path, source: Squares, num_workers: int) -> None:
    """Trains one epoch of warm-up, then the second stage."""
    gc.freeze()  # excludes imported objects from the count in each epoch
    callbacks = [
        ModelCheckpoint(folder / "checkpoints", monitor="val/mAP", mode="max", save_last=True),
        RunReport(enabled=False),
        Holdings(folder / "holdings.jsonl"),
    ]
    trainer = {"logger": RunLogger(folder, "", "run"), "callbacks": callbacks, "enable_checkpointing": True}
    data = {"num_workers": num_workers, "batch_size": 5}  # two steps per epoch
    tiny_fit(folder, clip, source, max_epochs=EPOCHS, data=data, trainer=trainer)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resources_do_not_grow(tmp_path, clip_folder, num_workers, capsys):
    source, log, begun = Squares(tmp_path / "squares", train=10, test=4), tmp_path / "log", time.monotonic()
    assert in_a_process(partial(long_run, tmp_path, clip_folder, source, num_workers), log) == 0, log.read_text()
    noted = [json.loads(line) for line in (tmp_path / "holdings.jsonl").read_text().splitlines()]
    assert len(noted) == EPOCHS
    epochs = np.arange(SETTLED, EPOCHS)
    memory = np.array([line["memory"] for line in noted[SETTLED:]], float)
    (slope, _), covariance = np.polyfit(epochs, memory, 1, cov=True)
    error = float(np.sqrt(covariance[0, 0]))
    with capsys.disabled():
        print(f"\n{num_workers} workers, {time.monotonic() - begun:.0f} s")
        for epoch in (1, 20, SETTLED, 100, EPOCHS):
            print(f"epoch {epoch:3}:", ", ".join(f"{value:,} {name}" for name, value in noted[epoch - 1].items()))
        print(f"memory: {slope / 1024:.2f} +- {error / 1024:.2f} KiB an epoch from epoch {SETTLED} on")
    for what in ("handles", "processes", "threads"):
        assert noted[-1][what] <= noted[19][what], what
    assert slope < LEAK
