"""Compares the cost of a training step with the reference recipe and with a lower bound (floor).

    uv run python benchmarks/step.py [--cells COCO:RN50:64 VOC:RN50:8 ...] [--precision 32-true] [--compile]
                                     [--picture docs/images/step.png] [--out FILE]

The following are measured in turn in each round, so that changes in the machine's speed affect all of them equally:

- *step*: a step of CBSAModule inside a Lightning Trainer, from one batch in memory to the next, including optimizer,
  average and logging.
- *reference*: the same computation, implemented as in the related code (reference_recipe.py).
- *floor*: the sum of the necessary parts, each measured separately: frozen image tower, and attention pool, text tower
  and decoder forward and backward. It excludes the loss, the optimizer, the average and the training loop.

Both losses are compared before the measurement. The minimum over the rounds is reported because other processes can
only increase a measurement. Memory is measured in a separate process: on a CPU, the growth of the process during the
first steps, and on a GPU, torch's peak. The weights are random.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measuring import markdown, where
from reference_recipe import ReferenceRecipe
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from cbsa_lightning import CBSAModule
from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.data.batches import TrainBatch

DATA = {  # classes, contexts, labeled fraction of a batch, unlabeled images at p = .05, validation images
    "COCO": (80, 6, 4 / 64, 77977, 40137),
    "VOC": (20, 2, 1 / 8, 5432, 5823),
    "NUS": (81, 2, 4 / 64, 142500, 60260),
}
SIZES = {"RN50": 224, "RN101": 448}
EVAL_BATCH = 128  # CAP's batch size for evaluation


def build(data: str, tower: str, dropout: float = 0.1) -> CBSAModule:
    """Builds CBSA's module with the paper's settings and random towers."""
    classes, contexts = DATA[data][:2]
    torch.manual_seed(0)
    names = [f"class {i}" for i in range(classes)]
    return CBSAModule(
        names,
        clip=f"{tower}-quickgelu",
        pretrained="random",
        num_contexts=contexts,
        warmup_epochs=0,
        decoder_dropout=dropout,
    )


def make_batch(data: str, size: int, batch: int) -> tuple[TrainBatch, Tensor, Tensor]:
    """Builds a batch with labels, and its pseudo-labels and context targets."""
    classes, contexts, share = DATA[data][:3]
    torch.manual_seed(1)
    labeled = torch.arange(batch) < max(1, round(share * batch))
    targets = (torch.rand(batch, classes) < 0.05).to(torch.int8).masked_fill(~labeled[:, None], -1)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    pseudo = (torch.rand(batch, classes) < 0.05).to(torch.int8)
    chosen = torch.nn.functional.one_hot(torch.randint(contexts, (batch,)), contexts).float()
    return TrainBatch(images, targets, torch.arange(batch), labeled), pseudo, chosen


def on(device: str, batch: TrainBatch) -> TrainBatch:
    return TrainBatch(*(None if value is None else value.to(device) for value in batch))


class Ours:
    """Runs steps of CBSAModule in a Trainer, and each part of a step separately."""

    def __init__(self, data: str, tower: str, batch: int, device: str, precision: str, compiled: bool) -> None:
        self.module, self.device, self.precision = build(data, tower), device, precision
        self.batch, pseudo, contexts = make_batch(data, SIZES[tower], batch)
        self.module.configure_callbacks = list  # no callbacks: pseudo-labels and context targets are set below
        self.module.ema.start(self.module.network)
        self.module.pseudo_labels, self.module.context_targets = pseudo.to(device), contexts.to(device)
        if compiled:
            self.module.network.clip.tower.compile()
            self.module.network.clip.text.compile()

    def steps(self, number: int) -> float:
        """Returns the seconds per step, over the last ``number`` of 1 + ``number`` steps."""
        clock = Clock(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                max_epochs=1,
                accelerator="gpu" if self.device == "cuda" else "cpu",
                devices=1,
                precision=self.precision,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            loader = DataLoader([self.batch] * (number + 1), batch_size=None, pin_memory=self.device == "cuda")
            trainer.fit(self.module, train_dataloaders=loader)
        self.module.to(self.device)
        return clock.seconds / number

    def autocast(self) -> Any:
        kinds = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        kind = kinds.get(self.precision)
        return torch.autocast(self.device, kind or torch.bfloat16, enabled=kind is not None)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the parts of a step, each of which can run separately."""
        self.module.to(self.device)
        network = self.module.network.train()
        batch = on(self.device, self.batch)
        with torch.no_grad(), self.autocast():
            features = network.features(batch.images)
            tokens = [path.l for path in network.clip.pool.both(features)]
            text = network.encode_text()

        def tower() -> None:
            with self.autocast():
                network.features(batch.images)

        def pool() -> None:
            with self.autocast():
                found, places = network.clip.pool.both(features)
            (found.g.float().sum() + found.l.float().sum() + places.l.float().sum()).backward()

        def encode() -> None:
            with self.autocast():
                found = network.encode_text()
            (found.target.float().sum() + found.semantic.float().sum()).backward()

        def decode() -> None:
            leaves = [x.detach().requires_grad_() for x in (text.semantic, *tokens)]
            with self.autocast():
                found, _ = network.decoder(*leaves)
            found.float().sum().backward()

        return {"image tower": tower, "attention pool": pool, "text tower": encode, "decoder": decode}

    def update(self) -> Callable[[], None]:
        """Returns a function that runs the optimizer and updates the average."""
        parameters = [p for p in self.module.network.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = self.module.make_optimizer(parameters)

        def run() -> None:
            optimizer.step()
            self.module.ema.update(self.module.network)

        return run

    def passes(self) -> dict[str, float]:
        """Returns the seconds per image of evaluation: for thresholds, and for validation of both sets of weights."""
        batch = on(self.device, self.batch)
        with torch.no_grad(), self.autocast(), self.module.evaluating():
            features = self.module.network.features(batch.images)
            image = timed(lambda: self.module.network.features(batch.images), self.device)
            head = timed(lambda: self.module.score(features), self.device)
        n = len(batch.images)
        return {"weak": (image + head) / n, "validation": (image + 2 * head) / n, "head": head / n}


class Reference:
    """Runs steps of the reference recipe, and its parts."""

    def __init__(self, data: str, tower: str, batch: int, device: str) -> None:
        ours = build(data, tower)
        torch.manual_seed(0)
        clip = FrozenCLIP.load(f"{tower}-quickgelu", None)  # the same seed gives the same random weights
        self.recipe = ReferenceRecipe(clip, ours.network).to(device).train()
        self.recipe.start_training()
        values = make_batch(data, SIZES[tower], batch)
        self.device, self.batch, self.tables = device, on(device, values[0]), [t.to(device) for t in values[1:]]

    def steps(self, number: int) -> float:
        """Returns the seconds per step."""
        return timed(lambda: self.recipe.step(self.batch, *self.tables), self.device, number)

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.float16, enabled=self.device == "cuda")

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the same parts as :meth:`Ours.parts`."""
        recipe, images = self.recipe, self.batch.images
        halves = (images[self.batch.labeled], images[~self.batch.labeled])
        with torch.no_grad(), self.autocast():
            features = [recipe.clip.features(half) for half in halves]
            tokens = [(recipe.clip.pool(f).l, recipe.clip.pool.values(f).l) for f in features]
            text = recipe.encode_text()

        def tower() -> None:
            with self.autocast():
                for half in halves:
                    recipe.clip.features(half)

        def pool() -> None:
            with self.autocast():
                found = [(*recipe.clip.pool(f)[:2], recipe.clip.pool.values(f).l) for f in features]
            sum(part.float().sum() for tokens in found for part in tokens).backward()

        def encode() -> None:
            with self.autocast():
                found = recipe.encode_text()
            (found[0].float().sum() + found[1].float().sum()).backward()

        def decode() -> None:
            leaf = text[1].detach().requires_grad_()
            with self.autocast():
                found = [recipe.decoder(leaf, *(t.requires_grad_() for t in both)) for both in tokens]
            sum(part.float().sum() for part in found).backward()

        return {"image tower": tower, "attention pool": pool, "text tower": encode, "decoder": decode}

    def update(self) -> Callable[[], None]:
        """Returns a function that runs the optimizer and updates the average."""
        for p in self.recipe.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
        if self.recipe.scaler.is_enabled():
            self.recipe.scaler.scale(torch.zeros((), device=self.device))
        return self.recipe.update

    def passes(self) -> dict[str, float]:
        """Returns the same as :meth:`Ours.passes`; each batch encodes the text, and validation has two passes."""
        n = len(self.batch.images)
        self.recipe.eval()
        with torch.no_grad(), self.autocast():
            text = self.recipe.encode_text()
            image = timed(lambda: self.recipe(self.batch.images, *text), self.device) / n
            encode = timed(self.recipe.encode_text, self.device) / EVAL_BATCH
        self.recipe.train()
        return {"weak": image + encode, "validation": 2 * (image + encode)}


class Clock(L.Callback):
    """Measures the seconds from the second to the last step of a fit; synchronizes a GPU only at both ends."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            _settle(pl_module.device.type)
            self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.number:
            _settle(pl_module.device.type)
            self.seconds = time.perf_counter() - self.begun


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], device: str, number: int = 1) -> float:
    """Returns the seconds per call."""
    _settle(device)
    begun = time.perf_counter()
    for _ in range(number):
        function()
    _settle(device)
    return (time.perf_counter() - begun) / number


@cache
def same_loss(tower: str) -> float:
    """Returns the relative difference of both losses on four images without dropout, in float32 on the CPU."""
    module, data = build("VOC", tower, dropout=0.0), "VOC"
    torch.manual_seed(0)
    recipe = ReferenceRecipe(FrozenCLIP.load(f"{tower}-quickgelu", None), module.network).train()
    batch, pseudo, contexts = make_batch(data, SIZES[tower], 4)
    expected = recipe.loss(batch, pseudo, contexts).item()
    module.pseudo_labels, module.context_targets = pseudo, contexts
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    module.log_dict = lambda *args, **kwargs: None
    return abs(float(module.training_step(batch, 0).detach()) - expected) / abs(expected)


def matmul_rate(device: str, kind: torch.dtype) -> float:
    """Returns the operations per second of large matrix products, an upper bound for the device."""
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=kind)
    return 2 * side**3 / min(timed(lambda: a @ a, device, 3) for _ in range(3))


def operations(ours: Ours) -> float:
    """Returns the operations of a step as counted by torch, summed over its parts; the rest is negligible."""
    total = 0.0
    for part in ours.parts().values():
        with FlopCounterMode(display=False) as counter:
            part()
        total += counter.get_total_flops()
    return total


def peak_memory(which: str, cell: str, device: str, precision: str) -> float:
    """Returns the memory growth during one or two steps in a separate process, in GB."""
    command = [sys.executable, __file__, "--memory-of", which, "--cells", cell, "--precision", precision]
    found = subprocess.run([*command, "--device", device], capture_output=True, text=True, check=True)
    return float(json.loads(found.stdout.splitlines()[-1]))


def print_memory(which: str, cell: str, device: str, precision: str) -> None:
    data, tower, batch = cell.split(":")
    runner: Any = (
        Ours(data, tower, int(batch), device, precision, False)
        if which == "step"
        else Reference(data, tower, int(batch), device)
    )
    if device == "cuda":
        runner.steps(1)
        print(json.dumps(torch.cuda.max_memory_allocated() / 1e9))
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which includes loading (Linux only)
    before = resident("VmRSS")
    runner.steps(1)
    print(json.dumps((resident("VmHWM") - before) / 1e9))


def resident(what: str) -> int:
    """Returns the resident memory of the process in bytes: current (``VmRSS``) or peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def measure(cell: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns all measurements of one cell."""
    data, tower, batch = cell.split(":")
    n = int(batch)
    difference = same_loss(tower)
    if difference > 1e-4:
        raise SystemExit(f"{cell}: the two losses differ by {difference:.2g}, so the times are not comparable.")
    ours = Ours(data, tower, n, args.device, args.precision, args.compile)
    reference = Reference(data, tower, n, args.device)
    both = {"step": ours, "reference": reference}
    rounds: list[dict[str, Any]] = []
    begun = time.perf_counter()
    while not rounds or (time.perf_counter() - begun < args.budget and len(rounds) < args.rounds):
        found: dict[str, Any] = {name: runner.steps(args.number) for name, runner in both.items()}
        found |= {f"{name} parts": _parts(runner, args) for name, runner in both.items()}
        rounds.append(found)
        print(f"  {cell} round {len(rounds)}: {_short(found)}", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {name: min(r[name] for r in rounds) for name in both}
    for name in both:
        key = f"{name} parts"
        figures[key] = {part: min(r[key][part] for r in rounds) for part in rounds[0][key]}
        figures[f"{name} passes"] = both[name].passes()
    figures["floor"] = sum(seconds for part, seconds in figures["step parts"].items() if part != "update")
    kind = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(args.precision, torch.float32)
    figures["rate"] = matmul_rate(args.device, kind)
    figures["operations"] = operations(ours)
    figures |= {"loss difference": difference, "rounds": len(rounds), "images": n, "data": data}
    del ours, reference, both
    which = ("step", "reference") if args.reference_memory else ("step",)
    figures["memory"] = {name: peak_memory(name, cell, args.device, args.precision) for name in which}
    return figures


def _parts(runner: Ours | Reference, args: argparse.Namespace) -> dict[str, float]:
    parts = {name: timed(part, args.device, args.number) for name, part in runner.parts().items()}
    parts["update"] = timed(runner.update(), args.device, args.number)
    return parts


def _short(found: dict[str, Any]) -> str:
    floor = sum(seconds for part, seconds in found["step parts"].items() if part != "update")
    return f"step {found['step']:.3f} s, reference {found['reference']:.3f} s, floor {floor:.3f} s"


def epoch(figures: dict[str, Any], who: str, cached: bool = False) -> float:
    """Returns the seconds of an epoch at p = .05, computed from measured steps and passes."""
    _, _, share, weak, validation = DATA[figures["data"]]
    n, passes = figures["images"], figures[f"{who} passes"]
    labeled = max(1, round(share * n))
    steps = math.ceil(weak / (n - labeled))
    if cached:
        return steps * figures[who] + weak * passes["head"] + validation * 2 * passes["head"]
    return steps * figures[who] + weak * passes["weak"] + validation * passes["validation"]


def report(results: dict[str, dict[str, Any]]) -> str:
    """Returns the tables as Markdown."""
    steps, parts, epochs = [], [], []
    for cell, f in results.items():
        n = f["images"]
        ms = {name: 1000 * f[name] / n for name in ("step", "reference", "floor")}
        share = f["operations"] / f["step"] / f["rate"]
        memory = [f"{f['memory'][who] / n:.4f}" if who in f["memory"] else "" for who in ("step", "reference")]
        steps.append([
            cell, *(f"{ms[name]:.2f}" for name in ms), f"{f['step'] / f['floor']:.2f}",
            f"{f['reference'] / f['step']:.2f}", *memory,
            f"{f['operations'] / n / 1e9:.1f}", f"{100 * share:.0f} %", f"{f['rounds']}",
        ])  # fmt: skip
        for who in ("step", "reference"):
            each = f[f"{who} parts"]
            rest = f[who] - sum(each.values())
            parts.append([cell, who, *(f"{1000 * s / n:.2f}" for s in (*each.values(), rest, f[who]))])
        hours = {who: epoch(f, who) for who in ("step", "reference")}
        cached = epoch(f, "step", cached=True)
        epochs.append([
            cell, f"{hours['step'] / 60:.1f}", f"{hours['reference'] / 60:.1f}",
            f"{hours['reference'] / hours['step']:.2f}", f"{cached / 60:.1f}", f"{hours['reference'] / cached:.2f}",
        ])  # fmt: skip
    header = ["data:tower:batch", "step ms/image", "reference", "floor", "step/floor", "reference/step"]
    header += ["step GB/image", "reference GB/image", "GFLOP/image", "fraction of matmul rate", "rounds"]
    names = ["image tower", "attention pool", "text tower", "decoder", "optimizer + average", "rest", "total"]
    return "\n\n".join([
        markdown(header, steps),
        "Time of a step by component in ms/image. The components are measured separately, so the rest can be slightly "
        "negative:",
        markdown(["data:tower:batch", "", *names], parts),
        "Minutes of an epoch at p = .05, computed from measured steps, the pass for thresholds and the validation of "
        "both sets of weights, without loading. In the last two columns, weak views and validation images are cached "
        "as features:",
        markdown(["data:tower:batch", "ours", "reference", "ratio", "ours, cached", "ratio"], epochs),
    ])  # fmt: skip


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Plots the components of both steps as stacked bars, one pair per cell."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = ["image tower", "attention pool", "text tower", "decoder", "update"]
    figure, axes = plt.subplots(len(results), 1, figsize=(9, 0.6 + 1.3 * len(results)), layout="constrained")
    for axis, (cell, f) in zip([axes] if len(results) == 1 else axes, results.items(), strict=True):
        for y, who in enumerate(("step", "reference")):
            left = 0.0
            each = [1000 * f[f"{who} parts"][name] / f["images"] for name in names]
            each.append(max(0.0, 1000 * f[who] / f["images"] - sum(each)))
            for i, width in enumerate(each):
                label = [*names[:-1], "optimizer + average", "rest"][i] if y == 0 else None
                axis.barh(y, width, left=left, color=f"C{i}", label=label)
                left += width
        axis.set_yticks([0, 1], ["now", "reference recipe"])
        axis.set_title(f"{cell}: reference / now = {f['reference'] / f['step']:.1f}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    axis.set_xlabel("ms per image", fontsize=9)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    cells = ["COCO:RN50:64", "VOC:RN50:8", "NUS:RN50:64", "COCO:RN101:64", "VOC:RN101:8", "NUS:RN101:64"]
    small = ["COCO:RN50:64", "VOC:RN50:8", "NUS:RN50:8", "VOC:RN101:8"]  # minutes on two cores
    parser.add_argument("--cells", nargs="+", default=cells if gpu else small, help="data:tower:batch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--precision", default="16-mixed" if gpu else "bf16-mixed")
    parser.add_argument("--number", type=int, default=20 if gpu else 1, help="steps per round")
    parser.add_argument("--rounds", type=int, default=6, help="maximum number of rounds")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per cell after which no new round starts")
    parser.add_argument("--reference-memory", action="store_true", help="also measure the reference recipe's memory")
    parser.add_argument("--compile", action="store_true", help="compile both towers of the library's network")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=["step", "reference"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_memory(args.memory_of, args.cells[0], args.device, args.precision)
        return
    results = {cell: measure(cell, args) for cell in args.cells}
    compiled = ", both towers compiled" if args.compile else ""
    recipe = "float16 autocast" if args.device == "cuda" else "float32, because its autocast does not work on a CPU"
    text = f"{where(args.device)}. Ours: {args.precision}{compiled}; reference recipe: {recipe}.\n\n{report(results)}\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
