"""A tiny data set of colored squares, for tests that need images, labels and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers import Source
from cbsa_lightning.method.context_task import ContextTask

CLASSES = ("red", "green", "blue", "yellow", "cyan")
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200))
GROUPS = ((0, 1), (2, 3, 4))  # classes that occur together
SIZE = 64
torch.set_num_threads(1)  # faster than two for such small models


class Squares(Source):
    """Gray images with squares in the colors of their classes, written into a folder once.

    Args:
        folder: Folder of the images.
        train: Number of training images.
        test: Number of test images; 0 means no test table.
        hidden: Rows of the training table whose labels are replaced by 1 - label, since training must not see them.
    """

    class_names = CLASSES
    prompt_names = CLASSES

    def __init__(self, folder: Path, train: int = 22, test: int = 7, hidden: Any = ()) -> None:
        rng = np.random.default_rng(0)
        self._train = self._write(folder, "train", train, rng)
        self._test = self._write(folder, "test", test, rng) if test else None
        labels = self._train.labels.copy()
        labels[list(hidden)] = 1 - labels[list(hidden)]
        self._train = AnnotationTable(self._train.root, self._train.paths, labels, CLASSES)

    @staticmethod
    def _write(folder: Path, name: str, number: int, rng: np.random.Generator) -> AnnotationTable:
        (folder / name).mkdir(parents=True, exist_ok=True)
        paths, labels = [], np.zeros((number, len(CLASSES)), dtype=np.int8)
        for i in range(number):
            group = GROUPS[i % 2]
            labels[i, rng.permutation(group)[: rng.integers(1, 3)]] = 1
            image = rng.integers(100, 150, (SIZE, SIZE, 3)).astype(np.uint8)
            for k in np.flatnonzero(labels[i]):
                top, left = rng.integers(0, SIZE - 20, 2)
                image[top : top + 20, left : left + 20] = COLOURS[k]
            paths.append(f"{name}/{i}.png")
            if not (folder / paths[-1]).exists():
                Image.fromarray(image).save(folder / paths[-1])
        return AnnotationTable(folder, np.array(paths, dtype=np.dtypes.StringDType()), labels, CLASSES)

    def prepare(self) -> None:
        """Does nothing."""

    def train(self) -> AnnotationTable:
        return self._train

    def test(self) -> AnnotationTable | None:
        return self._test


def tiny_data(source: Source, **settings: Any) -> SSMLLDataModule:
    """Returns a data module with 8 labeled of 22 training images and batches of 8."""
    plain = {"image_size": SIZE, "labeled_fraction": 0.4, "batch_size": 8, "num_workers": 0, "seed": 3}
    return SSMLLDataModule(source, **{**plain, **settings})


def tiny_module(clip: Path, **settings: Any) -> CBSAModule:
    """Returns the paper's method with small parts; its weights depend only on these arguments."""
    torch.manual_seed(0)
    plain = {
        "clip": str(clip),
        "num_contexts": 2,
        "contexts": ContextTask(pseudo_weight=1.0),  # recomputes the partition in each epoch
        "warmup_epochs": 1,
        "prompt_length": 2,
        "decoder_layers": 1,
        "decoder_heads": 4,
        "decoder_feedforward": 16,
        "ema_decay": 0.8,
    }
    return CBSAModule(CLASSES, **{**plain, **settings})


def tiny_trainer(folder: Path, max_epochs: int = 2, **settings: Any) -> L.Trainer:
    """Returns a quiet Trainer on the CPU."""
    plain = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
    }
    return L.Trainer(max_epochs=max_epochs, **{**plain, **settings})


def tiny_fit(
    folder: Path,
    clip: Path,
    source: Source,
    *,
    max_epochs: int = 2,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **module: Any,
) -> tuple[CBSAModule, L.Trainer]:
    """Runs a whole fit, whose result depends only on the arguments."""
    model = tiny_module(clip, **module)
    run = tiny_trainer(folder, max_epochs, **(trainer or {}))
    run.fit(model, datamodule=tiny_data(source, **(data or {})), ckpt_path=ckpt_path)
    return model, run


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Returns the common keys whose values are not bit-identical; NaN equals NaN."""
    return [
        key
        for key in first.keys() & second.keys()
        if first[key].shape != second[key].shape or not torch.allclose(first[key], second[key], 0, 0, equal_nan=True)
    ]
