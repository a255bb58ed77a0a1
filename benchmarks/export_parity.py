"""Compares the probabilities of exported models with those of ``Classifier``, for every system and kind of tower.

    uv run python benchmarks/export_parity.py [--only NAME ...] [--full] --out FILE

The networks are the small networks of the tests with random weights, which run the same code as full networks. With
``--full``, the script runs CBSA with fused scores on RN50 and ViT-B-32 instead. The script writes the largest
differences for batches of 1, 2, 7 and 64 smooth random images, the number of changed labels, and the spread: the
standard deviation of a probability over 64 images. The results agree only if the differences are far below the spread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import markdown, where

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_clip import VISION, tiny_clip
from tiny_systems import NAMES, SYSTEMS, WITHOUT_CLIP, classifier_of, differences, runtimes

BATCHES = (1, 2, 7, 64)
TOWERS = {"resnet": "CLIP ResNet", "vit": "CLIP ViT", "timm": "timm, absolute positions", "rot": "timm, rotary"}


def networks(folder: Path, full: bool) -> Iterator[tuple]:
    """Yields name, tower, a function that builds the network, image size, and whether scores are fused."""
    if full:
        for tower in ("RN50-quickgelu", "ViT-B-32-quickgelu"):
            yield (
                "CBSA, fused",
                tower,
                lambda tower=tower: SYSTEMS["CBSA"](NAMES, clip=tower, pretrained="random"),
                224,
                1,
            )
        return
    for kind, label in TOWERS.items():
        clip = str(tiny_clip(folder / kind, kind))
        for name, system in SYSTEMS.items():
            for fused in (False, True) if name in ("CBSA", "zero-shot") else (False,):
                title = "stacked probes" if fused and name == "zero-shot" else f"{name}, fused" if fused else name
                yield title, label, lambda system=system, clip=clip: system(NAMES, clip=clip), size_of(kind), fused
    for name, system in WITHOUT_CLIP.items():
        yield name, "ImageNet ResNet", lambda system=system: system(NAMES), 64, False


def size_of(kind: str) -> int:
    return VISION[kind]["image_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of systems")
    parser.add_argument("--full", action="store_true", help="run RN50 and ViT-B-32 at 224 pixels")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tower, build, size, fused in networks(Path(folder), args.full):
            if args.only and name not in args.only:
                continue
            torch.manual_seed(0)
            classifier = classifier_of(build(), size, fused)
            row, changed = [name, tower], 0
            for run in runtimes(classifier, Path(folder)).values():
                results = [differences(classifier, run, batch) for batch in BATCHES]
                row += [f"{difference:.1e}" for difference, _, _ in results]
                changed += sum(labels for _, labels, _ in results)
            rows.append([*row, str(changed), f"{results[-1][2]:.1e}"])
            print(*rows[-1], flush=True)
            header = [
                "system",
                "tower",
                *(f"{kind} {n}" for kind in ("ONNX", "pt2") for n in BATCHES),
                "changed labels",
                "spread",
            ]
            args.out.write_text(f"{where()}\n\n{markdown(header, rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
