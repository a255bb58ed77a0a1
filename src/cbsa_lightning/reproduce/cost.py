"""What a training step of a system costs: milliseconds and memory an image (Table 9).

Every system is measured in processes of its own, in turn and round by round, so that a machine whose speed drifts
drifts for all of them. A step is one of the second stage inside a Trainer, from one batch to the next: frozen tower,
forward, backward, optimizer and average, on images that lie in memory; decoding, views and the pass for pseudo-labels
are not in it. Weights are random, since they cost the same. Without a GPU memory is measured on Linux only.
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

UNCOUNTED = 2  # steps at the start, in which memory is taken and kernels are chosen


class Cost(NamedTuple):
    """Milliseconds and gigabytes (10^9 bytes) an image."""

    ms: float
    gb: float


def costs(recipes: Mapping[str, Mapping[str, Any]], rounds: int = 3, steps: int = 5) -> dict[str, Cost]:
    """Measures every recipe in turn, ``rounds`` times, and takes the least of each, since other work only adds.

    Args:
        recipes: Configuration of a run by name of its system; see :mod:`cbsa_lightning.reproduce.recipes`.
        rounds: How often each is measured.
        steps: Steps that are counted in a round.

    Raises:
        CBSAError: A system could not be measured, with what its process said.
    """
    found: dict[str, list[Cost]] = {name: [] for name in recipes}
    with TemporaryDirectory() as folder:
        for _ in tqdm(range(rounds), desc="Cost of a step, rounds"):
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
    """A recipe that needs no download; its steps take the same time."""
    changed = copy.deepcopy(dict(recipe))
    for place in classes_of(changed):
        if takes(place, "pretrained"):
            place["init_args"]["pretrained"] = RANDOM
    return changed


def measure(recipe: Path, steps: int) -> Cost:
    """Trains on random images; best in a process of its own, whose memory nothing else has touched."""
    cli = make_cli([f"--config={recipe}"], run=False)
    size = cli.datamodule.image_size
    batch = random_batch(cli, torch.randint(0, 256, (cli.datamodule.batch_size, 3, size, size), dtype=torch.uint8))
    meter = _Meter(steps)
    train_on(cli, batch, meter)
    images = len(batch.index)
    return Cost(1000 * meter.seconds / steps / images, meter.memory / 1e9 / images)


def random_batch(cli: CBSACLI, views: torch.Tensor) -> TrainBatch:
    """A batch of given views, uint8 images or features of them, with random labels on a sixteenth of them."""
    count, classes = len(views), len(cli.datamodule.class_names)
    labeled = torch.arange(count) < max(1, count // 16)
    targets = (torch.rand(count, classes) < 0.05).to(torch.int8).masked_fill(~labeled[:, None], -1)
    images, features = (views, None) if views.dtype == torch.uint8 else (None, views)
    return TrainBatch(images, targets, torch.arange(count), labeled, features)


def quiet_trainer(cli: CBSACLI, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """A Trainer on one device, with the accelerator and precision of the configuration, that writes nothing."""
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
    """Trains on one batch again and again, as the second stage does, until the clock has its steps."""
    module = cli.model
    module.configure_callbacks = list  # the tables are given, not made from a data set
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
    """Seconds of the counted steps together."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts before the first counted step."""
        if batch_idx == UNCOUNTED:
            settle(pl_module.device)
            self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops after the last one."""
        if batch_idx == UNCOUNTED + self.steps - 1:
            settle(pl_module.device)
            self.seconds = time.perf_counter() - self._begun


class _Meter(Clock):
    """And the memory of training: on a GPU torch's peak, else how far the process grew."""

    memory = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type != "cuda":
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading (Linux)
            self._before = _resident("VmRSS")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if batch_idx == UNCOUNTED + self.steps - 1:
            on_gpu = pl_module.device.type == "cuda"
            self.memory = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM") - self._before


def settle(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _resident(what: str) -> int:
    """Bytes in memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
