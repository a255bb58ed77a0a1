"""Measures whether the label decoder computes label-specific image features, and the effect of each of its parts.

    uv run python benchmarks/specificity.py --out DIR --data digits photos --shares 0.05 0.2 --seeds 1 2 3 \
        --photos DIR --clip DIR [--only NAME ...] [--epochs WARMUP SECOND]
    uv run python benchmarks/specificity.py --out DIR --mechanics [--only NAME ...] [--steps STEPS]

Each row changes one part of CBSA with the safe preset's pseudo-labels. The following metrics are computed from the
averaged weights on the test images before training, after the warm-up and at the end:

- *specific gain*: mAP minus the mAP if each label uses the mean of an image's label features;
- *z cosine*, *attention cosine*: mean cosine over pairs of labels in an image, of features and of attention maps;
- *pointing* (digits): how often the position with the highest attention is on the label's digit, on canvases with
  several digits. The control uses the attention maps of the other digits on the same canvas.

Finished runs are read from ``specificity.jsonl`` (with ``--epochs`` from ``specificity-WARMUP-SECOND.jsonl``) and not
repeated. With ``--mechanics``, the script trains RN50 with random weights on colored squares instead. These weights
contain no knowledge, so all specific features must come from the training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import cells as shared
import lightning as L
import numpy as np
import torch
from cells import (
    CONTEXTS,
    COUNTED,
    LABELED_PER_BATCH,
    SETTINGS,
    Cell,
    Results,
    arguments,
    cells,
    make_data,
    make_module,
    mean_and_error,
    trainer_settings,
)
from measuring import markdown, where
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.method.metrics import mean_pairwise_cosine
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.decoder import LabelDecoder

EPOCHS = {"digits": (120, 12), "photos": (24, 12)}


class RandomStart(LabelDecoder):
    """The decoder with torch's default initialization."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        for layer in self.modules():
            if isinstance(layer, nn.MultiheadAttention):
                layer._reset_parameters()
            elif isinstance(layer, nn.Linear):
                layer.reset_parameters()


class AttentionPathKeys(LabelDecoder):
    """The decoder with keys and values from attention-path tokens."""

    def inputs(self, queries: Tensor, local: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().inputs(queries, local, local)


class ValuePathValues(LabelDecoder):
    """The decoder with values from value-path tokens, which describe only their own position."""

    def inputs(self, queries: Tensor, local: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().inputs(queries, places, places)


class ClassNotAdded(LabelDecoder):
    """The decoder without the class query in the input of each cross-attention."""

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, labels, keys, values = super().inputs(*tensors)
        return x, torch.zeros_like(labels), 2 * keys, values  # the factor keeps the initial sharpness of the attention


class PostNormLayer(nn.TransformerDecoderLayer):
    """Torch's decoder block that stores its attention weights."""

    weights: Tensor

    def _mha_block(self, x: Tensor, mem: Tensor, *_: Any, **__: Any) -> Tensor:
        x, self.weights = self.multihead_attn(x, mem, mem)
        return self.dropout2(x)


class PostNorm(nn.Module):
    """The standard post-norm decoder on attention-path tokens, which this library used until November 2026."""

    def __init__(self, dim: int, layers: int, heads: int, feedforward: int, dropout: float, _: bool) -> None:
        super().__init__()
        sizes = (dim, heads, feedforward, dropout)
        self.layers = nn.ModuleList(PostNormLayer(*sizes, batch_first=True) for _ in range(layers))

    def forward(self, queries: Tensor, local: Tensor, places: Tensor, attention: bool = False) -> tuple[Tensor, Tensor]:
        x = queries.expand(len(local), -1, -1)
        for layer in self.layers:
            x = layer(x, local)
        return x, layer.weights


def decoder(kind: type[nn.Module]) -> Callable[[CBSAModule], None]:
    """Returns a function that replaces the decoder of a module."""

    def change(module: CBSAModule) -> None:
        old: Any = module.network.decoder
        block = old.blocks[0]
        sizes = (block.cross_attention.num_heads, block.linear1.out_features, block.dropout.p)
        module.network.decoder = kind(
            module.network.clip.embed_dim, len(old.blocks), *sizes, block.self_attention is not None
        )

    return change


def freeze_semantic(module: CBSAModule) -> None:
    """Freezes t^s at the features of "a photo of a <class>"."""
    module.network.semantic_prompts = module.network._prompts(4, False, "a photo of a", trainable=False)


# name: (changed settings, function that changes the untrained module)
ROWS: dict[str, tuple[dict[str, Any], Callable[[CBSAModule], None] | None]] = {
    "TP": ({"semantic_alignment": False}, None),
    "TP + SAA": ({}, None),
    "TP + SAA + CI": ({"num_contexts": -1}, None),
    "post-norm decoder": ({}, decoder(PostNorm)),
    "random start": ({}, decoder(RandomStart)),
    "attention-path keys": ({}, decoder(AttentionPathKeys)),
    "value-path values": ({}, decoder(ValuePathValues)),
    "class not added": ({}, decoder(ClassNotAdded)),
    "no self-attention": ({"decoder_self_attention": False}, None),
    "one block": ({"decoder_layers": 1}, None),
    "t^s frozen at the template": ({}, freeze_semantic),
    "pool frozen": ({"train_pool": False}, None),
    "pool at 0.1 of the learning rate": ({"pool_lr_scale": 0.1}, None),
    "TP, pool at 0.1 of the learning rate": ({"semantic_alignment": False, "pool_lr_scale": 0.1}, None),
    "post-norm decoder, pool at 0.1 of the learning rate": ({"pool_lr_scale": 0.1}, decoder(PostNorm)),
    "TP, pool frozen": ({"semantic_alignment": False, "train_pool": False}, None),
}


@cache
def boxes(drawing: int) -> list[dict[int, tuple[float, float, float, float]]]:
    """Returns the bounding boxes of the digits on the test canvases."""
    return Digits(seed=drawing).boxes("test")


@torch.no_grad()
def measure(module: CBSAModule, data: SSMLLDataModule, cell: Cell, drawing: int) -> dict[str, float]:
    """Computes the metrics of the averaged weights on the test images."""
    outputs, mean_logits, truth = [], [], []
    with module.evaluating(), module.ema.applied_to(module.network):
        text = module.network.encode_text()
        for batch in data.val_dataloader():
            output = module.network(module.features_of(batch), text, attention=True)
            truth.append(batch.targets)
            outputs.append(output)
            if output.label_features is not None:
                mean_logits.append(module.network.mean_feature_logits(output.label_features, text))
    labels = (torch.cat(truth) == 1).numpy()
    found = {"mAP": mean_ap(labels, torch.cat([o.logits for o in outputs]))}
    if mean_logits:
        found["specific"] = found["mAP"] - mean_ap(labels, torch.cat(mean_logits))
        found["z cosine"] = float(torch.cat([mean_pairwise_cosine(o.label_features) for o in outputs]).mean())
        maps = torch.cat([o.attention for o in outputs])
        found["attention cosine"] = float(mean_pairwise_cosine(maps.flatten(2)).mean())
        if cell.data == "digits":
            found["pointing"], found["control"] = pointing(maps, boxes(drawing))
    return found


def mean_ap(labels: np.ndarray, logits: Tensor) -> float:
    """Returns the mAP in % over the classes with at least :data:`COUNTED` test positives."""
    scores = logits.float().numpy()
    counted = np.flatnonzero(labels.sum(0) >= COUNTED)
    return 100 * float(np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in counted]))


def pointing(maps: Tensor, places: list[dict[int, tuple[float, float, float, float]]]) -> tuple[float, float]:
    """Returns the hits in %, and those of the other digits' maps (control), on images with several digits."""
    side, hits, controls = maps.shape[-1], [], []
    for image, digits in zip(maps, places, strict=True):
        points = {k: (np.array(divmod(int(image[k].argmax()), side)) + 0.5) * 160 / side for k in digits}
        for digit, (left, top, right, bottom) in digits.items():
            for other, (y, x) in points.items():
                hit = left <= x <= right and top <= y <= bottom
                if other != digit:
                    controls.append(hit)
                elif len(digits) > 1:
                    hits.append(hit)
    return 100 * float(np.mean(hits)), 100 * float(np.mean(controls))


class Watch(L.Callback):
    """Computes the metrics before training, after the warm-up and at the end."""

    def __init__(self, data: SSMLLDataModule, cell: Cell, drawing: int) -> None:
        self.of = data, cell, drawing
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found["untrained"] = measure(pl_module, *self.of)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, last in (("warm-up", pl_module.warmup_epochs), ("end", trainer.max_epochs)):
            if trainer.current_epoch + 1 == last:
                self.found[name] = measure(pl_module, *self.of)


def row(name: str, cell: Cell, args: Any) -> dict[str, Any]:
    """Trains a row and returns its metrics at the three points in time."""
    settings, change = ROWS[name]
    settings = {k: CONTEXTS[cell.data] if v == -1 else v for k, v in settings.items()}
    data = make_data(cell, args, LABELED_PER_BATCH)
    module = make_module(cell, args, data, labeler=StackedProbes(), **settings)
    if change is not None:
        change(module)
        module.ema = ParameterEMA(module.network, module.hparams["ema_decay"])
    watch = Watch(data, cell, args.drawing)
    trainer = L.Trainer(**{**trainer_settings(cell), "limit_val_batches": 0, "callbacks": [watch]})
    trainer.fit(module, datamodule=data)
    epochs = [SETTINGS[cell.data].warmup, SETTINGS[cell.data].epochs]
    return {"mAP": watch.found["end"]["mAP"], "steps": trainer.global_step, "epochs": epochs, **watch.found}


def table(rows: list[dict[str, Any]], data: str, share: float) -> str:
    """Returns a table of means and standard errors over the seeds."""
    lines = []
    for name in ROWS:
        mine = [r for r in rows if (r["run"], r["data"], r["share"]) == (name, data, share)]
        if mine:
            line = [name, len(mine), mine[0]["steps"]]
            for moment in ("untrained", "warm-up", "end"):
                line.append(mean_and_error(r[moment]["mAP"] for r in mine))
                line.append(mean_and_error(r[moment].get("specific", np.nan) for r in mine))
            for figure in ("z cosine", "attention cosine", "pointing", "control"):
                means = [np.mean([r[moment].get(figure, np.nan) for r in mine]) for moment in ("untrained", "end")]
                line.append(" → ".join(f"{mean:.3g}" for mean in means))
            lines.append(line)
    moments = [x for m in ("untrained", "warm-up", "end") for x in (f"mAP, {m}", "specific gain")]
    header = ["row", "seeds", "steps", *moments, "z cosine", "attention cosine", "pointing, %", "control, %"]
    return f"{data}, p = {share}\n\n" + markdown(header, lines)


def squares(number: int, rng: np.random.Generator, colors: np.ndarray, size: int = 160) -> tuple[Tensor, Tensor]:
    """Returns gray images with up to three colored squares at random positions, uint8 ``(n, 3, S, S)``, and labels."""
    images = rng.integers(90, 160, (number, size, size, 1)).repeat(3, 3).astype(np.uint8)
    labels = np.zeros((number, len(colors)), np.int8)
    for image, row in zip(images, labels, strict=True):
        for k in rng.permutation(len(colors))[: rng.integers(1, 4)]:
            x, y = rng.integers(0, size - 40, 2)
            image[y : y + 40, x : x + 40] = colors[k]
            row[k] = 1
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def mechanics_row(name: str, seed: int, steps: int, batch: int = 32) -> list[str]:
    """Trains RN50 with random weights on labeled images; returns the metrics before and after training."""
    rng = np.random.default_rng(seed)
    colors = rng.permutation([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)])[:6]
    L.seed_everything(seed, verbose=False)
    module = CBSAModule([f"color {k}" for k in range(6)], clip="RN50-quickgelu", pretrained="random", prompt_length=4)
    settings, change = ROWS[name]
    if settings:
        raise SystemExit(
            f"--mechanics trains on labels only with default settings, but {name!r} changes {settings}. Remove it from "
            "--only."
        )
    if change is not None:
        change(module)
    network = module.network
    (train, train_labels), (test, test_labels) = (
        (torch.cat([network.features(part) for part in images.split(16)]), labels)
        for images, labels in (squares(n, rng, colors) for n in (320, 200))
    )
    groups = network.parameter_groups()
    optimizer = torch.optim.AdamW([{"params": g["params"], "lr": 1e-3 * g["lr_scale"]} for g in groups])
    before = mechanics_figures(network, test, test_labels.numpy())
    for _ in range(steps):
        rows = torch.randint(len(train), (batch,))
        module.loss(network(train[rows]).logits, train_labels[rows]).sum().div(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before + mechanics_figures(network, test, test_labels.numpy())


@torch.no_grad()
def mechanics_figures(network: Any, features: Tensor, labels: np.ndarray) -> list[str]:
    """Returns mAP, specific gain, and the cosines of z and attention, as text."""
    network.eval()
    output = network(features, attention=True)
    mean_feature = mean_ap(labels, network.mean_feature_logits(output.label_features))
    alike = [float(mean_pairwise_cosine(x).mean()) for x in (output.label_features, output.attention.flatten(2))]
    network.train()
    found = mean_ap(labels, output.logits)
    return [f"{found:.1f}", f"{found - mean_feature:+.1f}", *(f"{x:.3f}" for x in alike)]


def mechanics(names: list[str], seeds: list[int], steps: int) -> str:
    """Returns the table of :func:`mechanics_row`."""
    lines = []
    for name in names:
        for seed in seeds:
            lines.append([name, seed, *mechanics_row(name, seed, steps)])
            print(lines[-1], flush=True)
    figures = ["mAP", "specific gain", "z cosine", "attention cosine"]
    moments = ("untrained", f"{steps} steps")
    return markdown(["row", "seed", *(f"{f}, {m}" for m in moments for f in figures)], lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mechanics", action="store_true", help="train RN50 with random weights on colored squares")
    parser.add_argument("--steps", type=int, default=300, help="training steps of --mechanics")
    parser.add_argument("--epochs", nargs=2, type=int, metavar=("WARMUP", "SECOND"), help="epochs of both stages")
    args = parser.parse_args()
    print(where(), flush=True)
    if args.mechanics:
        print(mechanics(args.only or ["post-norm decoder", "TP + SAA"], args.seeds, args.steps))
        return
    for name in args.data:
        warmup, second = args.epochs or EPOCHS[name]
        shared.SETTINGS[name] = SETTINGS[name]._replace(warmup=warmup, epochs=second)
    # Runs of other lengths are stored in separate files because runs are identified only by name and cell.
    results = Results("-".join(["specificity", *map(str, args.epochs or [])]) + ".jsonl", args)
    for cell in cells(args):
        for name in args.only or ROWS:
            if not results.has(name, cell):
                results.add(name, cell, row(name, cell, args))
    for data, share in dict.fromkeys((c.data, c.share) for c in cells(args)):
        print("\n" + table(results.read(), data, share))


if __name__ == "__main__":
    main()
