"""Compares the cost of a training step with the reference recipe and with a lower bound (floor).

    uv run python benchmarks/step.py [--cells COCO:RN50:64 VOC:RN50:8 ...] [--precisions 32-true bf16-mixed]
                                     [--parts] [--compile] [--picture docs/images/step.png] [--out FILE.md]

In each round, the following are measured in turn, so that changes in the machine's speed affect all of them equally:

- *step*: a step of CBSAModule inside a Lightning Trainer, from one batch in memory to the next, including optimizer,
  average and logging.
- *reference*: the same computation, implemented as in the related code (reference_recipe.py).
- *floor*: the necessary parts in their best known form (floor.py). It excludes the loss, the optimizer, the average,
  the training loop and dropout.

Each of them first runs ``--warm-up`` uncounted steps. Ratios are computed within a round. The report contains medians
over the rounds with minimum and maximum, for wall time and processor time, and the load of the machine. On a machine
that other processes use, only processor time is meaningful. Ratios of fewer than five rounds are not reported. If a
step takes less time than its floor, the measurement is wrong: the report says so instead of giving the ratio, and the
script fails.

Before the measurement, the losses of step and reference are compared, and the outputs of step and floor. On a CPU,
memory is measured in a separate process, as its growth during the first step; on a GPU, it is the growth of torch's
peak. The weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from floor import Floor
from measuring import Stopwatch, Took, markdown, spread, timed, where
from reference_recipe import ReferenceRecipe
from torch.utils.data import DataLoader
from workload import Workload, autocast, on

ROUNDS = 5  # minimum number of rounds of a reported ratio
PARTS = ["image tower", "attention pool", "text tower", "decoder"]


class Ours:
    """Runs steps of CBSAModule in a Trainer, and each part of a step separately."""

    def __init__(self, workload: Workload, device: str, precision: str, compiled: bool = False) -> None:
        self.module, self.device, self.precision = workload.module(), device, precision
        self.batch = workload.images()
        self.module.configure_callbacks = list  # no callbacks: pseudo-labels and context targets are set below
        self.module.ema.start(self.module.network)
        self.module.pseudo_labels, self.module.context_targets = (t.to(device) for t in workload.tables())
        if compiled:
            self.module.network.clip.tower.compile()
            self.module.network.clip.text.compile()

    def steps(self, number: int, warm_up: int) -> Took:
        """Returns the time per step, after ``warm_up`` steps."""
        clock = Clock(warm_up, number)
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
            loader = DataLoader([self.batch] * (warm_up + number), batch_size=None, pin_memory=self.device == "cuda")
            trainer.fit(self.module, train_dataloaders=loader)
        self.module.to(self.device)
        return Took(*(seconds / number for seconds in clock.took))

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the parts of a step, each of which can run separately."""
        self.module.to(self.device)
        network = self.module.network.train()
        batch = on(self.device, self.batch)
        with torch.no_grad(), autocast(self.device, self.precision):
            features = network.features(batch.images)
            tokens = [path.l for path in network.clip.pool.both(features)]
            text = network.encode_text()

        def tower() -> None:
            with autocast(self.device, self.precision):
                network.features(batch.images)

        def pool() -> None:
            with autocast(self.device, self.precision):
                found, places = network.clip.pool.both(features)
            (found.g.float().sum() + found.l.float().sum() + places.l.float().sum()).backward()

        def encode() -> None:
            with autocast(self.device, self.precision):
                found = network.encode_text()
            (found.target.float().sum() + found.semantic.float().sum()).backward()

        def decode() -> None:
            leaves = [x.detach().requires_grad_() for x in (text.semantic, *tokens)]
            with autocast(self.device, self.precision):
                found, _ = network.decoder(leaves[0].to(tokens[0].dtype), *leaves[1:])
            found.float().sum().backward()

        return dict(zip(PARTS, (tower, pool, encode, decode), strict=True))


class Reference:
    """Runs steps of the reference recipe, and its parts."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.recipe = ReferenceRecipe(workload.towers(), workload.module().network).to(device).train()
        self.recipe.start_training()
        self.device, self.batch = device, on(device, workload.images())
        self.tables = [t.to(device) for t in workload.tables()]

    def steps(self, number: int, warm_up: int) -> Took:
        """Returns the time per step, after ``warm_up`` steps."""
        for _ in range(warm_up):
            self.recipe.step(self.batch, *self.tables)
        return timed(lambda: self.recipe.step(self.batch, *self.tables), self.device, number)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the same parts as :meth:`Ours.parts`."""
        recipe, images = self.recipe, self.batch.images
        half = torch.autocast(self.device, torch.float16, enabled=self.device == "cuda")
        with torch.no_grad(), half:
            features = recipe.clip.features(images)
            tokens = recipe.clip.pool(features).l, recipe.clip.pool.values(features).l
            text = recipe.encode_text()

        def tower() -> None:
            with half:
                recipe.clip.features(images)

        def pool() -> None:
            with half:
                found = (*recipe.clip.pool(features)[:2], recipe.clip.pool.values(features).l)
            torch.stack([part.float().sum() for part in found]).sum().backward()

        def encode() -> None:
            with half:
                found = recipe.encode_text()
            (found[0].float().sum() + found[1].float().sum()).backward()

        def decode() -> None:
            leaves = [x.detach().requires_grad_() for x in (text[1], *tokens)]
            with half:
                found = recipe.decoder(*leaves)
            found.float().sum().backward()

        return dict(zip(PARTS, (tower, pool, encode, decode), strict=True))


class Clock(L.Callback):
    """Measures the time of a fit after its first ``warm_up`` steps; synchronizes a GPU only at both ends."""

    def __init__(self, warm_up: int, number: int) -> None:
        self.first, self.last = warm_up, warm_up + number - 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.watch = Stopwatch(pl_module.device.type)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            self.took = self.watch.read()


@cache
def check_equality(tower: str) -> None:
    """Checks that step, reference and floor compute the same function without dropout, on four images in float32.

    Raises:
        SystemExit: If they do not, so that their times cannot be compared.
    """
    workload = Workload("VOC", tower, 4)
    module, floor = workload.module(dropout=0.0), Floor(workload, "cpu", "32-true")
    batch, tables = workload.images(), workload.tables()
    expected = ReferenceRecipe(workload.towers(), module.network).train().loss(batch, *tables)
    module.pseudo_labels, module.context_targets = tables
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    module.log_dict = lambda *args, **kwargs: None
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        features = module.network(module.network.features(batch.images)).label_features
        bound = floor.outputs()[2]
    found = {
        "loss of the reference recipe": abs(float(loss - expected)) / abs(float(expected)),
        "label features of the floor": float((bound - features).abs().max() / features.abs().max()),
    }
    for name, difference in found.items():
        if not difference < 1e-4:
            raise SystemExit(f"{tower}: the {name} differs by {difference:.2g}, so the times are not comparable.")


def growth(runner: Any, device: str) -> float:
    """Returns the growth of the memory during the first step, in GB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.steps(1, 0)
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which includes loading (Linux only)
    before = _resident("VmRSS")
    runner.steps(1, 0)
    return (_resident("VmHWM") - before) / 1e9


def _resident(what: str) -> int:
    """Returns the resident memory of the process in bytes: current (``VmRSS``) or peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def memory(cell: str, device: str, precision: str) -> float:
    """Returns the memory of a step in GB; see :func:`growth`."""
    if device == "cuda":
        return growth(Ours(Workload.parse(cell), device, precision), device)
    command = [sys.executable, __file__, "--memory-of", cell, "--precisions", precision]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(found.stdout.splitlines()[-1]))


def measure(cell: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the times of all rounds of a cell in seconds, and the memory of a step in GB."""
    workload = Workload.parse(cell)
    check_equality(workload.tower)
    runners: dict[str, Any] = {"reference": Reference(workload, args.device)}
    for precision in args.precisions:
        runners[f"step {precision}"] = Ours(workload, args.device, precision, args.compile)
        runners[f"floor {precision}"] = Floor(workload, args.device, precision)
    rounds = []
    for i in range(args.rounds):
        found: dict[str, Any] = {"load": os.getloadavg()[0]}
        found |= {name: runner.steps(args.number, args.warm_up)._asdict() for name, runner in runners.items()}
        if args.parts:
            found["parts"] = {name: _parts(runner, args) for name, runner in runners.items()}
        rounds.append(found)
        times = ", ".join(f"{name} {found[name]['wall']:.3f} s" for name in runners)
        print(f"{cell} round {i + 1} of {args.rounds}: {times}", file=sys.stderr, flush=True)
    runners.clear()
    return {
        "images": workload.batch,
        "rounds": rounds,
        "memory": {precision: memory(cell, args.device, precision) for precision in args.precisions},
    }


def _parts(runner: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    return {name: timed(part, args.device, args.number)._asdict() for name, part in runner.parts().items()}


class Report:
    """Tables of the measurements, and the defects that were found while they were written."""

    def __init__(self, results: dict[str, dict[str, Any]], device: str) -> None:
        self.results, self.device = results, device
        self.defects: list[str] = []

    def text(self) -> str:
        """Returns the report as Markdown."""
        loads = [r["load"] for f in self.results.values() for r in f["rounds"]]
        sections = [
            f"Load average of the machine, at the start of each round: {min(loads):.1f} to {max(loads):.1f}. The first "
            "value shows the load from other processes. Values are medians over the rounds, with minimum and maximum.",
            "Wall time:",
            self.times("wall"),
            "Processor time over all threads:",
            self.times("cpu"),
        ]
        if any("parts" in f["rounds"][0] for f in self.results.values()):
            sections += [f"Parts of a step, measured separately ({_clock(self.device)} time, medians):", self.parts()]
        if self.defects:
            sections += ["Defects of the measurement:", "\n".join(f"- {defect}" for defect in self.defects)]
        return "\n\n".join(sections)

    def times(self, clock: str) -> str:
        """Returns the table of times and ratios of one clock."""
        rows = []
        for cell, f in self.results.items():
            for precision, gb in f["memory"].items():
                ms = {
                    name: [1000 * r[key][clock] / f["images"] for r in f["rounds"]]
                    for name, key in _keys(precision).items()
                }
                ratios = self.ratios(f"{cell}, {precision}", ms, clock)
                values = [spread(ms[name]) for name in ("step", "reference", "floor")]
                rows.append([cell, precision, *values, *ratios, f"{gb / f['images']:.4f}", str(len(f["rounds"]))])
        header = ["data:tower:batch", "precision", "step, ms/image", "reference", "floor", "step/floor"]
        return markdown([*header, "reference/step", "step, GB/image", "rounds"], rows)

    def ratios(self, name: str, ms: dict[str, list[float]], clock: str) -> list[str]:
        """Returns step/floor and reference/step, and records a defect if a step is faster than its floor."""
        if len(ms["step"]) < ROUNDS:
            return [f"needs {ROUNDS} rounds"] * 2
        above = [step / floor for step, floor in zip(ms["step"], ms["floor"], strict=True)]
        gain = [reference / step for reference, step in zip(ms["reference"], ms["step"], strict=True)]
        if clock == "cpu" and self.device == "cuda":
            return ["", spread(gain)]  # the floor bounds the time of the device, not that of the host
        if (ratio := statistics.median(above)) < 1:
            self.defects.append(
                f"{name}: the {clock} time of a step is {ratio:.2f} times its floor, which is impossible. Repeat the "
                "measurement on a machine without other load. If the result is the same, floor.py lacks a form that "
                "the library uses."
            )
            return ["defect", spread(gain)]
        return [spread(above), spread(gain)]

    def parts(self) -> str:
        """Returns the table of the parts of a step."""
        rows = []
        for cell, f in self.results.items():
            for name in f["rounds"][0]["parts"]:
                total = 1000 * statistics.median(r[name][_clock(self.device)] for r in f["rounds"]) / f["images"]
                each = part_times(f, name, self.device)
                rows.append([cell, name, *(f"{ms:.2f}" for ms in (*each, total - sum(each), total))])
        return markdown(["data:tower:batch", "", *PARTS, "rest", "total"], rows)


def _keys(precision: str) -> dict[str, str]:
    return {"step": f"step {precision}", "reference": "reference", "floor": f"floor {precision}"}


def _clock(device: str) -> str:
    return "wall" if device == "cuda" else "cpu"


def part_times(found: dict[str, Any], name: str, device: str) -> list[float]:
    """Returns the median times of the parts in ms per image."""
    clock = _clock(device)
    return [
        1000 * statistics.median(r["parts"][name][part][clock] for r in found["rounds"]) / found["images"]
        for part in PARTS
    ]


def draw(results: dict[str, dict[str, Any]], file: Path, device: str) -> None:
    """Plots the parts of the floor, our step and the reference as stacked bars, one group per cell."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(cell, precision) for cell, f in results.items() for precision in f["memory"]]
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 0.8 + 1.4 * len(groups)), layout="constrained")
    for axis, (cell, precision) in zip([axes] if len(groups) == 1 else axes, groups, strict=True):
        f, keys = results[cell], _keys(precision)
        for y, who in enumerate(("floor", "step", "reference")):
            each = part_times(f, keys[who], device)
            total = 1000 * statistics.median(r[keys[who]][_clock(device)] for r in f["rounds"]) / f["images"]
            left = 0.0
            for i, width in enumerate([*each, max(0.0, total - sum(each))]):
                axis.barh(y, width, left=left, color=f"C{i}", label=[*PARTS, "rest"][i] if y == 0 else None)
                left += width
        axis.set_yticks([0, 1, 2], ["lower bound", "this library", "reference recipe"])
        axis.set_title(f"{cell}, {precision}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    axis.set_xlabel("ms per image" if device == "cuda" else "processor time, ms per image", fontsize=9)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    cells = ["COCO:RN50:64", "VOC:RN50:8", "NUS:RN50:64"]
    cells += ["COCO:RN101:64", "VOC:RN101:8", "NUS:RN101:64"] if gpu else []
    parser.add_argument("--cells", nargs="+", default=cells, help="data:tower:batch")
    parser.add_argument("--precisions", nargs="+", default=["16-mixed"] if gpu else ["32-true", "bf16-mixed"])
    parser.add_argument("--number", type=int, default=20 if gpu else 1, help="counted steps per round")
    parser.add_argument("--warm-up", type=int, default=3 if gpu else 1, help="uncounted steps per round, at least 1")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--parts", action="store_true", help="also measure each part of a step separately")
    parser.add_argument("--compile", action="store_true", help="compile both towers of the library's network")
    parser.add_argument("--picture", type=Path, help="plot of the parts; implies --parts")
    parser.add_argument("--out", type=Path, help="Markdown file; the measurements are written next to it as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device, args.parts = "cuda" if gpu else "cpu", args.parts or args.picture is not None
    if args.warm_up < 1:
        parser.error("--warm-up must be at least 1, because the first step of a process takes longer than the others")
    if args.memory_of:
        print(json.dumps(growth(Ours(Workload.parse(args.memory_of), args.device, args.precisions[0]), args.device)))
        return
    results: dict[str, dict[str, Any]] = {}
    recipe = "float16 autocast" if gpu else "float32, because its autocast does not work on a CPU"
    compiled = " Both towers are compiled." if args.compile else ""
    for cell in args.cells:  # files are written after each cell, so that an interrupted run loses only one cell
        results[cell] = measure(cell, args)
        report = Report(results, args.device)
        text = f"{where(args.device)}. Reference recipe: {recipe}.{compiled}\n\n{report.text()}\n"
        if args.out:
            args.out.write_text(text)
            args.out.with_suffix(".json").write_text(json.dumps(results))
    print(text)
    if args.picture:
        draw(results, args.picture, args.device)
    if report.defects:
        raise SystemExit("The measurement has defects; see the end of the report.")


if __name__ == "__main__":
    main()
