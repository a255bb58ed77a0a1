"""Short cells on a small generated VOC, and a callback that interrupts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import yaml

from layouts import make_voc

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def write_overlay(file: Path, **content: Any) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def tiny_voc(folder: Path) -> Path:
    """Writes the overlay of 24 training and 12 test images; 4 of 20 classes have at least 2 test positives."""
    make_voc(folder / "voc")
    source = {"class_path": "cbsa_lightning.data.readers.voc.VOC", "init_args": {"root": str(folder / "voc")}}
    return write_overlay(folder / "tiny_voc.yaml", data={"source": source, "batch_size": 8, "image_size": 64})


def short(folder: Path, epochs: int, **trainer: Any) -> Path:
    """Writes an overlay for the CPU: ``epochs`` epochs of two steps, the first of which is the warm-up."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return write_overlay(
        folder / "short.yaml",
        trainer={"max_epochs": epochs, "limit_train_batches": 2, **quiet, **trainer},
        data={"num_workers": 0, "eval_batch_size": 16, "image_size": 64},  # Table 5 has 448
        model={"init_args": {"warmup_epochs": 1}},
        report={"enabled": False},
    )


class PowerCutError(Exception):
    """Not an error of the library, so no code catches it."""


class PowerCut(L.Callback):
    """Stops a run in the first step of an epoch if the file ``flag`` exists, and removes the file."""

    def __init__(self, flag: str, epoch: int) -> None:
        self.flag, self.epoch = Path(flag), epoch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and self.flag.is_file():
            self.flag.unlink()
            raise PowerCutError
