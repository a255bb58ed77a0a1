"""Measures the cost of a training step of a system: milliseconds and memory per image (Table 9).

Each measurement runs in a separate process. The systems take turns in each round, so that changes in the machine's
speed affect all of them equally. A step is measured in the second stage inside a Trainer, from one batch to the next:
frozen tower, forward pass, backward pass, optimizer and weight average, on images in memory. It excludes decoding,
views and the scoring pass for pseudo-labels. The weights are random because this does not affect the cost. Without a
GPU, memory can only be measured on Linux.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cbsa_lightning.cli.lightning_cli import CBSACLI, make_cli
from cbsa_lightning.clip.loading import RANDOM
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.errors import CBSAError
from cbsa_lightning.reproduce.recipes import classes_of, takes

UNCOUNTED = 2  # steps before the measurement, in which memory is allocated and kernels are selected


class Cost(NamedTuple):
    """Milliseconds and gigabytes (10^9 bytes) per image."""

    ms: float
    gb: float


def costs(recipes: Mapping[str, Mapping[str, Any]], rounds: int = 3, steps: int = 5) -> dict[str, Cost]:
    """Measures the cost of the recipes in turn, ``rounds`` times, and returns the minimum for each.

    The minimum is the best estimate because other processes can only increase a measurement.

    Args:
        recipes: Maps the name of each system to the configuration of a run; see
            :mod:`cbsa_lightning.reproduce.recipes`.
        rounds: Number of measurements of each system.
        steps: Number of measured steps in a round.

    Raises:
        CBSAError: If a system cannot be measured; the message contains the output of its process.
    """
    found: dict[str, list[Cost]] = {name: [] for name in recipes}
    with TemporaryDirectory() as folder:
        for _ in tqdm(range(rounds), desc="Measuring the cost of a step"):
            for name, recipe in recipes.items():
                file = Path(folder) / "recipe.yaml"
                file.write_text(yaml.safe_dump(with_random_weights(recipe)), encoding="utf-8")
                command = [sys.executable, "-m", "cbsa_lightning.reproduce.cost", str(file), str(steps)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
                if done.returncode:
                    raise CBSAError(f"The cost of {name} could not be measured:\n{done.stderr[-2000:]}")
                found[name].append(Cost(*json.loads(done.stdout.splitlines()[-1])))
    return {name: Cost(min(c.ms for c in each), min(c.gb for c in each)) for name, each in found.items()}


def with_random_weights(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a recipe with random weights, which need no download and cost the same per step."""
    changed = copy.deepcopy(dict(recipe))
    for place in classes_of(changed):
        if takes(place, "pretrained"):
            place["init_args"]["pretrained"] = RANDOM
    return changed


def measure(recipe: Path, steps: int) -> Cost:
    """Measures training on random images.

    Call it in a new process: earlier allocations would distort the measured memory.
    """
    cli = make_cli([f"--config={recipe}"], run=False)
    size = cli.datamodule.image_size
    batch = random_batch(cli, torch.randint(0, 256, (cli.datamodule.batch_size, 3, size, size), dtype=torch.uint8))
    meter = _Meter(steps)
    train_on(cli, batch, meter)
    images = len(batch.index)
    return Cost(1000 * meter.seconds / steps / images, meter.memory / 1e9 / images)


def random_batch(cli: CBSACLI, views: torch.Tensor) -> TrainBatch:
    """Returns a batch of the given views (uint8 images or features), one sixteenth of them with random labels."""
    count, classes = len(views), len(cli.datamodule.class_names)
    labeled = torch.arange(count) < max(1, count // 16)
    targets = (torch.rand(count, classes) < 0.05).to(torch.int8).masked_fill(~labeled[:, None], -1)
    images, features = (views, None) if views.dtype == torch.uint8 else (None, views)
    return TrainBatch(images, targets, torch.arange(count), labeled, features)


def quiet_trainer(cli: CBSACLI, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Returns a Trainer that uses one device and the configured accelerator and precision, and writes no files."""
    given: dict[str, Any] = cli.config_init["trainer"]
    return L.Trainer(
        max_epochs=1,
        accelerator=given["accelerator"],
        precision=given["precision"],
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train_on(cli: CBSACLI, batch: TrainBatch, clock: Clock) -> None:
    """Runs second-stage training steps on the same batch until the clock has measured its steps."""
    module = cli.model
    module.configure_callbacks = list  # _give_tables replaces what the callbacks compute
    module.warmup_epochs = 0
    module.ema.start(module.network)
    trainer = quiet_trainer(cli, [clock])
    _give_tables(module, batch, trainer.strategy.root_device)
    batches: Any = [batch] * (UNCOUNTED + clock.steps)
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())
    trainer.fit(module, train_dataloaders=loader)


def _give_tables(module: Any, batch: TrainBatch, device: torch.device) -> None:
    count, classes = batch.targets.shape
    module.pseudo_labels = (torch.rand(count, classes) < 0.05).to(device, torch.int8)
    if module.num_contexts:
        chosen = torch.randint(module.num_contexts, (count,), device=device)
        module.context_targets = torch.nn.functional.one_hot(chosen, module.num_contexts).float()


class Clock(L.Callback):
    """Callback that measures the total time of the counted steps, in seconds."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the measurement before the first counted step."""
        if batch_idx == UNCOUNTED:
            settle(pl_module.device)
            self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops the measurement after the last counted step."""
        if batch_idx == UNCOUNTED + self.steps - 1:
            settle(pl_module.device)
            self.seconds = time.perf_counter() - self._begun


class _Meter(Clock):
    """Clock that also measures memory: PyTorch's peak on a GPU, otherwise the growth of the process during training."""

    memory = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type != "cuda":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which includes loading (Linux only)
            self._before = _resident("VmRSS")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if batch_idx == UNCOUNTED + self.steps - 1:
            on_gpu = pl_module.device.type == "cuda"
            self.memory = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM") - self._before


def settle(device: torch.device) -> None:
    """Waits until the GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _resident(what: str) -> int:
    """Returns the resident memory of the process in bytes: current (``VmRSS``) or peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
