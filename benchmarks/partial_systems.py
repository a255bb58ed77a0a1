"""Compares a training step of the systems for partial labels with the computation in their released code.

    python benchmarks/partial_systems.py --systems SSGRL SST HST SARB DSRB --batch 4

Both forms have the same weights, and their losses are compared. A step belongs to an epoch with all loss terms: frozen
stages, last stage, head, loss terms, backward pass and Adam, on random images of 448 pixels with 80 classes and 10 % of
the labels known. The written-out forms in this file store the same tensors as the released code: ``(B, H, W, C, m)``
and ``(B, H, W, C, D)`` for semantic decoupling, pairs of labels joined before the first layer, and blended maps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import markdown, where
from step import resident
from torch import Tensor, nn

from cbsa_lightning.method.losses import MeanBinaryCrossEntropy
from cbsa_lightning.networks.dsrb import DSRB
from cbsa_lightning.networks.hooks import Batch, Moment
from cbsa_lightning.networks.hst import HST
from cbsa_lightning.networks.processes import WholeBatch
from cbsa_lightning.networks.sarb import SARB
from cbsa_lightning.networks.ssgrl import SSGRL
from cbsa_lightning.networks.sst import SST
from cbsa_lightning.networks.word_vectors import WordVectors

SYSTEMS: dict[str, type[SSGRL]] = {"SSGRL": SSGRL, "SST": SST, "HST": HST, "SARB": SARB, "DSRB": DSRB}
CLASSES, SIZE = 80, 448


class RandomWords(WordVectors):
    """Random vectors of GloVe's size."""

    def __init__(self, class_names: Any) -> None:
        self.vectors = 0.35 * torch.randn(len(class_names), 300)


class WrittenOutDecoupling(nn.Module):
    """Semantic decoupling that stores a value for each position, class and channel."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        ours, number = self.ours, len(words)
        batch, dim, rows, columns = features.shape
        places = features.permute(0, 2, 3, 1).reshape(-1, dim)
        image = ours.image(places).unsqueeze(1).repeat(1, number, 1)
        word = ours.word(words).unsqueeze(0).repeat(len(places), 1, 1)
        scores = ours.score(ours.mix((image * word).tanh())).view(batch, rows * columns, number)
        attention = scores.softmax(1)
        each = attention.view(batch, rows, columns, number, 1).repeat(1, 1, 1, 1, dim)
        self.maps = places.view(batch, rows, columns, 1, dim).repeat(1, 1, 1, number, 1) * each
        return self.maps.sum(1).sum(1), attention.transpose(1, 2)


class WrittenOutPairs(nn.Module):
    """Label pairs that are joined before the first layer."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.ours, self.targets, self.given_known = ours, ours.targets, ours.given_known

    def forward(self, features: Tensor) -> Tensor:
        ours = self.ours
        x = ours.project(features)
        joined = torch.cat([x[:, ours.first], x[:, ours.second]], 2)
        return (ours.mix(ours.join(joined).relu()) * ours.weight).sum(2) + ours.bias


def blend_maps(network: Any, hooks: Any, batch: Batch, other: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
    """Returns the loss of maps ``(B, H, W, C, D)`` that are blended with other maps."""
    maps = network.decouple.maps
    weight = torch.where(chosen, share, torch.ones_like(share))[:, None, None, :, None].expand_as(maps)
    logits = network.classify((weight * maps + (1 - weight) * other).sum(1).sum(1))
    targets = torch.where(chosen, 1 - share, (batch.targets == 1).float())
    counted = (batch.targets >= 0) | chosen
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")[counted].mean()


class Step:
    """A network with its optimizer and a batch."""

    def __init__(self, name: str, number: int, written_out: bool) -> None:
        torch.manual_seed(0)
        names = [f"class {k}" for k in range(CLASSES)]
        self.network = SYSTEMS[name](names, pretrained="random", words=RandomWords).train()
        self.images = torch.randint(0, 256, (number, 3, SIZE, SIZE), dtype=torch.uint8)
        labels = (torch.rand(number, CLASSES) < 0.2).to(torch.int8)
        labels[torch.rand(number, CLASSES) > 0.1] = -1
        self.labels, self.moment = labels, Moment(6, 1, 10)
        if (prototypes := getattr(self.network.hooks, "prototypes", None)) is not None:
            prototypes.copy_(torch.randn(prototypes.shape))
        self.maps = written_out and name == "DSRB"
        if written_out:
            self.network.decouple = WrittenOutDecoupling(self.network.decouple)
            if hasattr(self.network, "pairs"):
                self.network.pairs = WrittenOutPairs(self.network.pairs)
        self.optimizer = torch.optim.Adam([p for p in self.network.parameters() if p.requires_grad], lr=1e-5)

    def loss(self) -> Tensor:
        network: Any = self.network
        output = network(network.features(self.images))
        batch = Batch(output, self.labels, WholeBatch(torch.ones(len(self.labels), dtype=torch.bool)))
        main = MeanBinaryCrossEntropy()(output.logits, self.labels).sum() / len(self.labels)
        if not self.maps:
            return main + sum(network.hooks.terms(network, batch, self.moment).values())
        return main + self._blended_maps(batch)

    def _blended_maps(self, batch: Batch) -> Any:
        """Returns the terms of DSRB on maps; the library's hooks choose the prototypes and labels."""
        network: Any = self.network
        hooks, terms = network.hooks, {}

        def blend(_: Any, batch: Batch, other: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
            if "instance" not in terms:
                terms["instance"] = blend_maps(network, hooks, batch, network.decouple.maps.flip(0), chosen, share)
                return terms["instance"]
            rows, columns = network.decouple.maps.shape[1:3]
            # The prototype map of a quadrant is constant here, and its sum is the prototype.
            kept = (hooks.prototypes / (rows * columns))[None, :, :, None, None].repeat(
                len(batch.targets), 1, 1, rows, columns, 1
            )
            which = (hooks.prototypes[None] - other[:, :, None]).abs().sum(-1).argmin(-1)
            picked = sum((which == q)[..., None, None, None] * kept[:, :, q] for q in range(4))
            return blend_maps(network, hooks, batch, picked.permute(0, 2, 3, 1, 4), chosen, share)

        hooks._loss = blend
        return sum(hooks.terms(network, batch, self.moment).values())

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def measure(name: str, number: int, written_out: bool, steps: int) -> dict[str, float]:
    """Measures the minimum CPU time of a step in seconds, and the memory of the first step without the weights in GB.

    The time is CPU time of one thread, which other processes hardly affect. The memory includes gradients and optimizer
    state, which are the same in both forms.
    """
    torch.set_num_threads(1)
    step = Step(name, number, written_out)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which includes loading (Linux only)
    before = resident("VmRSS")
    loss = step()
    memory = (resident("VmHWM") - before) / 1e9
    seconds = []
    for _ in range(steps):
        begun = time.process_time()
        step()
        seconds.append(time.process_time() - begun)
    return {"loss": loss, "seconds": min(seconds), "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", choices=["ours", "written out"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.systems[0], args.batch, args.one != "ours", args.steps)))
        return
    rows = []
    for name in args.systems:
        found = {}
        for form in ("ours", "written out"):  # in separate processes, to measure the peak memory of each
            command = [sys.executable, __file__, "--systems", name, "--batch", str(args.batch)]
            command += ["--steps", str(args.steps), "--one", form]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[form] = json.loads(output.splitlines()[-1])
        ours, theirs = found.values()
        difference = abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])
        row = [name, *(f"{1000 * f['seconds'] / args.batch:.0f}" for f in (ours, theirs))]
        row += [f"{theirs['seconds'] / ours['seconds']:.1f}", *(f"{f['memory']:.2f}" for f in (ours, theirs))]
        rows.append([*row, f"{difference:.0e}"])
        print(rows[-1], file=sys.stderr, flush=True)
    header = [
        "system",
        "ms/image",
        "written out",
        "ratio",
        "GB per step",
        "written out",
        "relative difference of the losses",
    ]
    about = f"Batches of {args.batch}, {SIZE} px, {CLASSES} classes, float32, CPU time of one thread"
    print(f"{where()}. {about}.\n\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
