"""Trains the small CLIP that ships with the package.

    uv run python scripts/train_embedded_clip.py

The training images are simple posters with captions: printed and handwritten digits and printed letters on soft-colored
backgrounds. They share no digit images, no scenes and no co-occurrence with the quickstart's data set (`Digits`).
The model therefore recognizes those digits only moderately well, as CLIP does with photographs from a new source.

An image and a caption are a positive pair if the image shows every digit in the caption. The loss is the sigmoid loss
over all pairs of a batch (SigLIP, arXiv 2303.15343). With ten digits, most captions match several images of a batch,
which the softmax loss would count as errors. The learned bias is the same for all pairs, so it does not affect the
ranking and is not saved.

The stages start with small posters with one digit and end with the full size and several digits. Digits keep their size
in pixels, so the convolutions are first trained at low cost. The same seed, number of threads and library versions give
the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from PIL import Image, ImageDraw, ImageFont
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_lightning.data.canvases import exemplars, handwritten
from cbsa_lightning.data.readers.digits import NAMES

IMAGE_SIZE = 160
MEAN, STD = 0.5, 0.25
CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": [1, 1, 1, 1],
            "width": 12,
            "head_width": 48,
            "patch_size": None,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "size": IMAGE_SIZE,
        "mode": "RGB",
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
TEMPLATES = (
    "a photo of a {}.", "a photo of a {}", "a picture of a {}.", "an image with a {}", "a photo of the digit {}",
    "a drawing of a {}", "the number {}", "a poster that shows a {}", "a {} on paper", "{}",
)  # fmt: skip
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmss10",
)  # fmt: skip
LETTERS = "ABCDEFGHJKLMNPQRTUVWXY"
HANDWRITTEN = 0.4  # fraction of handwritten digits; the others are printed


class Stage(NamedTuple):
    """``steps`` batches of ``batch`` posters with ``size`` pixels and up to ``digits`` digits.

    ``color`` ranges from 0 (dark digits on white) to 1 (any colors). Training from scratch with 1 makes no progress for
    a long time.
    """

    size: int
    color: float
    digits: int
    letters: int
    batch: int
    steps: int
    max_lr: float


STAGES = (
    Stage(64, 0.2, 1, 0, 96, 250, 2e-3),
    Stage(64, 0.7, 1, 1, 96, 200, 2e-3),
    Stage(96, 0.9, 2, 1, 64, 300, 2e-3),
    Stage(IMAGE_SIZE, 1.0, 4, 3, 48, 450, 2e-3),
)


class Batch(NamedTuple):
    """A batch of posters.

    Attributes:
        images: ``(B, 3, S, S)`` in [0, 1].
        present: ``(B, 10)`` bool, the digits on each poster.
        captions: B captions.
        named: ``(B, 10)`` bool, the digits in each caption.
    """

    images: Tensor
    present: Tensor
    captions: list[str]
    named: Tensor


class Posters:
    """Generates batches of posters with captions from a collection of digit and letter masks."""

    def __init__(self, seed: int, masks_per_digit: int = 500) -> None:
        self.rng = np.random.default_rng(seed)
        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 64) for name in FONTS]
        source = exemplars("pretrain")
        self.digits: list[list[np.ndarray]] = []
        for digit in range(10):
            rows = np.flatnonzero(source.digits == digit)
            count = round(masks_per_digit * HANDWRITTEN)
            pens = [self._handwritten(source.images[self.rng.choice(rows)]) for _ in range(count)]
            self.digits.append(pens + [self._printed(str(digit)) for _ in range(masks_per_digit - count)])
        self.letters = [self._printed(LETTERS[i % len(LETTERS)]) for i in range(masks_per_digit)]

    def _handwritten(self, image: np.ndarray) -> np.ndarray:
        pixels, turn, slant = int(self.rng.uniform(42, 70)), self.rng.normal(0, 0.15), self.rng.normal(0, 0.1)
        return np.asarray(handwritten(image, pixels, turn, slant), dtype=np.float32)[..., None] / 255

    def _printed(self, text: str) -> np.ndarray:
        page = Image.new("L", (96, 96))
        font = self.fonts[self.rng.integers(len(self.fonts))]
        ImageDraw.Draw(page).text((48, 48), text, fill=255, font=font, anchor="mm")
        page = page.rotate(self.rng.normal(0, 9), Image.Resampling.BICUBIC)
        pixels = int(self.rng.uniform(46, 76))
        return np.asarray(page.resize((pixels, pixels)), dtype=np.float32)[..., None] / 255

    def batch(self, stage: Stage) -> Batch:
        """Returns a batch in which each caption names some or all of the digits on its poster."""
        rng = self.rng
        cells = int(rng.integers(2, 6))
        coarse = torch.from_numpy(rng.random((stage.batch, 3, cells, cells), dtype=np.float32))
        grounds = F.interpolate(coarse, size=stage.size, mode="bicubic").permute(0, 2, 3, 1).numpy().copy()
        grounds = 0.9 + stage.color * (grounds - 0.9)
        present, named, captions = np.zeros((2, stage.batch, 10), dtype=bool), None, []
        present, named = present
        for canvas, shown, told in zip(grounds, present, named, strict=True):
            self._pattern(canvas, stage.color)
            digits = rng.permutation(10)[: rng.integers(1, stage.digits + 1)]
            masks = [self.digits[d][rng.integers(len(self.digits[d]))] for d in digits]
            letters = [self.letters[rng.integers(len(self.letters))] for _ in range(rng.integers(0, stage.letters + 1))]
            self._paste(canvas, letters + masks, stage.color)
            shown[digits] = True
            told[digits[: 1 if rng.random() < 0.5 else rng.integers(1, len(digits) + 1)]] = True
            captions.append(self._caption(np.flatnonzero(told)))
        grounds += rng.standard_normal(grounds.shape[1:], dtype=np.float32) * 0.03  # shared by the whole batch
        images = torch.from_numpy(grounds.clip(0, 1)).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(present), captions, torch.from_numpy(named))

    def _pattern(self, canvas: np.ndarray, color: float) -> None:
        """Adds colored blocks, stripes or a checkerboard to most backgrounds."""
        rng, size, kind = self.rng, len(canvas), self.rng.random()
        if kind < 0.4:
            for y, x, height, width in rng.uniform((0, 0, 0.1, 0.1), (1, 1, 0.6, 0.4), size=(5, 4)) * size:
                block = canvas[int(y) : int(y + height), int(x) : int(x + width)]
                block += 0.6 * color * (rng.random(3, dtype=np.float32) - block)
        elif kind < 0.7:
            line = np.sign(np.sin(np.arange(size, dtype=np.float32) * (2 * np.pi / rng.uniform(6, 40))))
            pattern = line[:, None] * (line[None] if rng.random() < 0.5 else 1)
            pattern = pattern if rng.random() < 0.5 else pattern.T
            canvas += pattern[..., None] * (color * rng.uniform(-0.15, 0.15, 3)).astype(np.float32)

    def _paste(self, canvas: np.ndarray, masks: list[np.ndarray], color: float) -> None:
        """Draws masks on the canvas, each at the least crowded of eight random positions."""
        rng, size, taken = self.rng, len(canvas), np.zeros((0, 2))
        for mask in masks:
            width = len(mask)
            corners = rng.integers(min(0, size - width), max(1, size - width + 1), size=(8, 2))
            spread = np.abs(corners[:, None] + width / 2 - taken).max(-1).min(-1, initial=size)
            y, x = corners[spread.argmax()]
            taken = np.vstack([taken, corners[spread.argmax()] + width / 2])
            y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + width, size), min(x + width, size)
            area, alpha = canvas[y0:y1, x0:x1], mask[y0 - y : y1 - y, x0 - x : x1 - x]
            ground = area.mean((0, 1))
            # The first color with enough contrast is used.
            inks = 0.1 + color * (rng.random((6, 3), dtype=np.float32) - 0.1)
            ink = inks[np.argmax(np.abs(inks - ground).mean(-1) > 0.25)]
            area += alpha * (ink - area)

    def _caption(self, digits: np.ndarray) -> str:
        words = [NAMES[d] if self.rng.random() < 0.85 else str(d) for d in self.rng.permutation(digits)]
        joint = (" and a ", " and ", ", ")[self.rng.integers(3)]
        return TEMPLATES[self.rng.integers(len(TEMPLATES))].format(joint.join(words))


def resize_positions(pool: nn.Module, old: int, new: int) -> None:
    """Interpolates the attention pool's position table from an ``old`` x ``old`` grid to ``new`` x ``new``."""
    first, rest = pool.positional_embedding.data[:1], pool.positional_embedding.data[1:]
    grid = F.interpolate(rest.T.reshape(1, -1, old, old), size=new, mode="bicubic")
    pool.positional_embedding = nn.Parameter(torch.cat([first, grid[0].flatten(1).T]))


def encode_captions(model: CLIP, tokens: Tensor) -> Tensor:
    """Computes ``encode_text`` for truncated tokens, which is exact because the text tower is causal, and cheaper."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection


@torch.no_grad()
def zero_shot_ap(model: CLIP, tokenizer: open_clip.SimpleTokenizer, batches: list[Batch]) -> float:
    """Returns the mean average precision of the prompts "a photo of a three." etc. on posters."""
    from sklearn.metrics import average_precision_score

    text = model.encode_text(tokenizer([f"a photo of a {name}." for name in NAMES]), normalize=True)
    scores = [model.encode_image(normalize(batch.images), normalize=True) @ text.T for batch in batches]
    present = torch.cat([batch.present for batch in batches])
    return float(average_precision_score(present.numpy(), torch.cat(scores).numpy()))


def normalize(images: Tensor) -> Tensor:
    """Normalizes images in [0, 1] for the image tower."""
    return ((images - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def train(seed: int) -> CLIP:
    """Trains the model in the stages of `STAGES`."""
    torch.manual_seed(seed)
    posters, held_out = Posters(seed), Posters(seed + 1, masks_per_digit=60)
    tokenizer = open_clip.get_tokenizer("RN50")
    model = CLIP(**CONFIG["model_cfg"], init_logit_scale=float(np.log(10)))
    model.visual.to(memory_format=torch.channels_last)
    bias = nn.Parameter(torch.tensor(-2.0))
    grid = IMAGE_SIZE // 32
    with Progress() as progress:
        for stage in STAGES:
            resize_positions(model.visual.attnpool, grid, stage.size // 32)
            grid = stage.size // 32
            # Weight decay would shrink word vectors that do not occur in captions.
            decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
            others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embedding" in n]
            groups = [
                {"params": decayed, "weight_decay": 0.02},
                {"params": [*others, bias], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=stage.max_lr, betas=(0.9, 0.98))
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, stage.max_lr, total_steps=stage.steps, pct_start=0.1
            )
            task, began, mean_loss = (
                progress.add_task(f"{stage.size} px", total=stage.steps),
                time.time(),
                0.0,
            )
            model.train()
            for step in range(stage.steps):
                batch = posters.batch(stage)
                tokens = tokenizer(batch.captions)
                tokens = tokens[:, : int((tokens != 0).sum(1).max())]
                with torch.autocast("cpu", torch.bfloat16):
                    image = model.encode_image(normalize(batch.images))
                text = encode_captions(model, tokens)
                logits = model.logit_scale.exp() * F.normalize(image.float()) @ F.normalize(text).T + bias
                fits = (batch.present.float() @ batch.named.T.float()) == batch.named.sum(1)
                loss = F.softplus(torch.where(fits, -logits, logits)).sum() / stage.batch
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                model.logit_scale.data.clamp_(0, float(np.log(100)))
                mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
                progress.advance(task)
                if step % 50 == 49 or step == stage.steps - 1:
                    progress.print(
                        f"{stage.size} px, step {step + 1}: loss {mean_loss:.3f}, {time.time() - began:.0f} s"
                    )
            model.eval()
            score = zero_shot_ap(model, tokenizer, [held_out.batch(stage) for _ in range(4)])
            progress.print(f"{stage.size} px: zero-shot mAP on new posters {score:.3f}")
    return model


def main() -> None:
    """Trains the model and writes its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = Path(__file__).resolve().parents[1] / "src" / "cbsa_lightning" / "embedded"
    parser.add_argument("--out", type=Path, default=package, help="output folder (default: the folder in the package)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = train(args.seed)
    # Half precision halves the size of the file. open_clip copies the weights into a float32 model.
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    file = args.out / "open_clip_model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # some versions of safetensors make the file readable only for its owner


if __name__ == "__main__":
    main()
