"""Measures the speed-up of each optimization of a training step.

    uv run python benchmarks/economies.py [--tower RN50] [--batch 16] [--data COCO] [--compile] [--out FILE]

Each row compares a part of the step with and without one optimization. Both forms run alternately in one process, and
the ratio is the median over the rounds. Trained parts run forward and backward, except in the rows of the optimizer and
the average. The script reports wall time on a GPU and processor time on a CPU. The weights are random.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from measuring import markdown, timed, where
from reference_recipe import StockDecoder
from torch import Tensor, nn
from workload import DATA, TOWERS

import cbsa_lightning.attention
import cbsa_lightning.clip.pooling
import cbsa_lightning.clip.text
import cbsa_lightning.dropout
import cbsa_lightning.networks.attention
from cbsa_lightning import CBSAModule
from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.clip.loading import RANDOM
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.networks.prompts import ClassPrompts, encode_prompt_sets

Part = Callable[[], Any]


class Bench:
    """The measured network and its inputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.half = args.device, torch.float16 if args.device == "cuda" else torch.bfloat16
        torch.manual_seed(0)
        names = DATA[args.data][0]
        clip, size = TOWERS[args.tower]
        module = CBSAModule(names, clip=clip, pretrained=RANDOM, warmup_epochs=0)
        self.network = module.network.to(self.device).train()
        torch.manual_seed(0)
        self.plain = FrozenCLIP.load(clip, RANDOM).to(self.device)
        shape = (args.batch, 3, size, size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            self.features = self.network.features(self.images)
            self.tokens, self.places = (path.l for path in self.network.clip.pool.both(self.features))
            self.queries = self.network.encode_text().semantic
        self.names = names

    def autocast(self, function: Part, enabled: bool = True) -> Part:
        def run() -> None:
            with torch.autocast(self.device, self.half, enabled=enabled):
                function()

        return run

    def trained(self, function: Callable[[], list[Tensor]]) -> Part:
        """Returns a function that runs forward with autocast, and backward."""

        def run() -> None:
            with torch.autocast(self.device, self.half):
                found = function()
            torch.stack([part.float().sum() for part in found]).sum().backward()

        return run

    def timed(self, function: Part) -> float:
        """Returns seconds of wall time on a GPU, and of processor time on a CPU, which other processes may share."""
        took = timed(function, self.device)
        return took.wall if self.device == "cuda" else took.cpu


def tower(bench: Bench, compiled: bool) -> Iterator[tuple[str, Part, Part]]:
    """Yields the rows of the frozen image tower."""
    images, ours = bench.images, bench.network.clip
    nhwc = copy.deepcopy(bench.plain)
    nhwc.tower.to(memory_format=torch.channels_last)
    for half in (False, True):
        kind = str(bench.half).removeprefix("torch.") if half else "float32"
        fast = bench.autocast(lambda: ours.features(images), half)
        yield (
            f"channels-last, {kind}",
            bench.autocast(lambda: nhwc.features(images), half),
            bench.autocast(lambda: bench.plain.features(images), half),
        )
        yield f"batch norms folded, {kind}", fast, bench.autocast(lambda: nhwc.features(images), half)
    yield "half-precision autocast", fast, lambda: ours.features(images)
    few = max(1, len(images) // 16)
    yield (
        "one pass for labeled and unlabeled",
        fast,
        bench.autocast(lambda: (ours.features(images[:few]), ours.features(images[few:]))),
    )
    if compiled:
        compiled_tower = copy.deepcopy(ours)
        compiled_tower.tower.compile()
        yield "torch.compile of the tower (not used)", bench.autocast(lambda: compiled_tower.features(images)), fast


def text(bench: Bench, compiled: bool) -> Iterator[tuple[str, Part, Part]]:
    """Yields the rows of the text tower, forward and backward."""
    network, plain = bench.network, bench.plain
    sets = [network.target_prompts, network.semantic_prompts]
    mask = torch.full((77, 77), float("-inf"), device=bench.device).triu(1)
    ours = bench.trained(lambda: encode_prompt_sets(network.clip, sets))

    def stock(length: int | None) -> list[Tensor]:
        """Runs open_clip's blocks on ``length`` positions; None uses as many as the prompts need."""
        embeddings, ends = (torch.cat(part) for part in zip(*(prompts() for prompts in sets), strict=True))
        x = nn.functional.pad(embeddings, (0, 0, 0, (length or embeddings.shape[1]) - embeddings.shape[1]))
        tower, n = plain.text, x.shape[1]
        x = tower.transformer(x + tower.positional_embedding[:n], attn_mask=mask[:n, :n])
        return [tower.ln_final(x)[torch.arange(len(x)), ends] @ tower.text_projection]

    yield (
        "prompts truncated after the last end token",
        bench.trained(lambda: stock(None)),
        bench.trained(lambda: stock(77)),
    )
    yield "custom blocks: no transposes, only end tokens in the last block", ours, bench.trained(lambda: stock(None))
    yield (
        "QuickGELU folded into the layers around it",
        ours,
        bench.trained(lambda: encode_prompt_sets(plain, sets)),
    )

    def padded() -> list[Tensor]:
        embeddings, ends = (torch.cat(part) for part in zip(*(prompts() for prompts in sets), strict=True))
        one_group = cbsa_lightning.clip.text._Packing(torch.arange(len(ends)), ends, [tuple(embeddings.shape[:2])])
        with patch.object(cbsa_lightning.clip.text._Packing, "of", lambda *_: one_group):
            return [network.clip.encode_prompts(embeddings, ends)]

    if bench.device == "cpu":
        yield "no padding, and the start token encoded once", ours, bench.trained(padded)
    yield (
        "both prompt sets in one pass",
        ours,
        bench.trained(lambda: [encode_prompt_sets(network.clip, [one])[0] for one in sets]),
    )
    shared = [ClassPrompts(network.clip, bench.names, shared=True).to(bench.device) for _ in range(2)]
    prefix_once = bench.trained(lambda: encode_prompt_sets(network.clip, shared))

    def repeated() -> list[Tensor]:
        embeddings, ends = (torch.cat(part) for part in zip(*(prompts() for prompts in shared), strict=True))
        return [network.clip.encode_prompts(embeddings, ends)]

    yield "shared prompts: shared words encoded once", prefix_once, bench.trained(repeated)
    if compiled:
        other = copy.deepcopy(network)
        other.clip.text.compile()
        yield (
            "torch.compile of the text tower (not used)",
            bench.trained(lambda: encode_prompt_sets(other.clip, [other.target_prompts, other.semantic_prompts])),
            ours,
        )


def heads(bench: Bench, compiled: bool) -> Iterator[tuple[str, Part, Part]]:
    """Yields the rows of decoder and attention pool, forward and backward, and of the decoder without gradient."""
    decoder = bench.network.decoder
    inputs = bench.queries, bench.tokens, bench.places
    stock = StockDecoder(decoder).to(bench.device)
    ours = bench.trained(lambda: [decoder(*inputs)[0]])
    theirs = bench.trained(lambda: [stock(*inputs)])
    yield "decoder: shared queries projected once", ours, theirs
    yield "decoder: dropout with 16 random bits", ours, bench.trained(with_torch_dropout(lambda: [decoder(*inputs)[0]]))

    def without_gradient(model: nn.Module, run: Part) -> Part:
        def evaluate() -> None:
            model.eval()
            with torch.no_grad():
                bench.autocast(run)()
            model.train()

        return evaluate

    yield (
        "decoder without gradient",
        without_gradient(decoder, lambda: decoder(*inputs)),
        without_gradient(stock, lambda: stock(*inputs)),
    )
    pool = bench.network.clip.pool
    for name, function in (
        ("text tower", lambda: encode_prompt_sets(bench.network.clip, [bench.network.target_prompts])),
        ("attention pool", lambda: list(pool(bench.features)[:2])),
        ("decoder", lambda: [decoder(*inputs)[0]]),
    ):
        yield f"{name}: attention", bench.trained(function), bench.trained(with_fused_attention(function))


def with_torch_dropout(function: Part) -> Part:
    """Returns a function that runs ``function`` with torch's dropout."""
    modules = cbsa_lightning.dropout, cbsa_lightning.attention, cbsa_lightning.networks.attention
    return with_replaced("drop", nn.functional.dropout, modules, function)


def with_fused_attention(function: Part) -> Part:
    """Returns a function that runs ``function`` with torch's fused attention in all precisions."""

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)

    modules = cbsa_lightning.clip.text, cbsa_lightning.clip.pooling, cbsa_lightning.networks.attention
    return with_replaced("attention", fused, modules, function)


def with_replaced(name: str, other: Callable[..., Tensor], modules: Iterable[ModuleType], function: Part) -> Part:
    """Returns a function that runs ``function`` with ``other`` instead of the function ``name`` of some modules."""

    def run() -> Any:
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(patch.object(module, name, other))
            return function()

    return run


def update(bench: Bench, compiled: bool) -> Iterator[tuple[str, Part, Part]]:
    """Yields the rows of the optimizer and the weight average."""
    parameters = [p for p in bench.network.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    fused, plain = (torch.optim.AdamW(parameters, lr=0.0, fused=kind) for kind in (True, None))
    yield "fused AdamW", fused.step, plain.step
    average, whole = ParameterEMA(bench.network, 0.9997), copy.deepcopy(bench.network.state_dict())

    @torch.no_grad()
    def everything() -> None:
        for name, value in bench.network.state_dict().items():
            if value.is_floating_point():
                whole[name].copy_(0.9997 * whole[name] + 0.0003 * value)

    yield "average of trainable weights, foreach", lambda: average.update(bench.network), everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=list(TOWERS), default="RN50")
    parser.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 16)
    parser.add_argument("--data", choices=list(DATA), default="COCO", help="data set whose classes are used")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile (takes minutes on a CPU)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    bench = Bench(args)
    rows = []
    for group in (tower, text, heads, update):
        for name, ours, without in group(bench, args.compile):
            ours(), without()
            pairs = [(bench.timed(ours), bench.timed(without)) for _ in range(args.rounds)]
            medians = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
            ratio = statistics.median(other / own for own, other in pairs)
            rows.append([name, f"{medians[0]:.1f}", f"{medians[1]:.1f}", f"{ratio:.2f}"])
            print(" | ".join(rows[-1]), flush=True)
    table = markdown(["optimization", "with, ms", "without, ms", "without/with"], rows)
    shape = f"{args.tower} at {TOWERS[args.tower][1]}, batch {args.batch}, classes of {args.data}"
    text_ = f"{where(args.device)}. {shape}.\n\n{table}\n"
    print(text_)
    if args.out:
        args.out.write_text(text_)


if __name__ == "__main__":
    main()
