"""Checkpoints of a tiny model: cut off, with bits flipped, with fields changed, with pickles that ask for code."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.training.cbsa import CBSAModule
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, damage_bytes, odd_value, pick

CLASSES = ["cat", "dog", "potted_plant"]
_PLACES = ("m.ckpt", "pretrained=")  # weights that are not there are named by the setting that asks for them


class Checkpoints(Target):
    """``Classifier.load`` and one prediction."""

    name, share, seconds = "checkpoints", 3, 60.0

    def prepare(self, folder: Path) -> None:
        """Makes a tiny CLIP and a checkpoint on it."""
        import lightning as L

        sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
        from tiny_clip import tiny_clip

        torch.set_num_threads(1)
        torch.manual_seed(0)
        towers = tiny_clip(folder / "towers", "resnet")
        module = CBSAModule(CLASSES, clip=str(towers), num_contexts=2, prompt_length=3, decoder_feedforward=16)
        module.ema.start(module.network)
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / "sound.ckpt")
        self.content = (folder / "sound.ckpt").read_bytes()
        self.tree = torch.load(folder / "sound.ckpt", weights_only=True)
        self.image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    def draw(self, rng: Rng) -> Case:
        """Half damaged as bytes, half as a tree."""
        chance = rng.random()
        if chance < 0.3:
            content = self.content[: int(rng.integers(len(self.content)))] if rng.random() < 0.2 else self.content
            return Case({"m.ckpt": damage_bytes(rng, content)}, {}, _PLACES)
        if chance < 0.5:
            return Case({"m.ckpt": self._pickle(rng)}, {}, _PLACES)
        tree = dict(self.tree)
        for _ in range(int(rng.integers(1, 3))):
            self._damage(rng, tree)
        buffer = io.BytesIO()
        try:
            torch.save(tree if rng.random() < 0.98 else odd_value(rng), buffer)
        except Exception:  # a text that pickle cannot write
            return self.draw(rng)
        return Case({"m.ckpt": buffer.getvalue()}, {}, _PLACES)

    @staticmethod
    def _damage(rng: Rng, tree: dict[str, Any]) -> None:
        key = pick(rng, list(tree))
        inner = pick(rng, ("state_dict", "hyper_parameters", key))
        if isinstance(tree.get(inner), dict) and tree[inner] and rng.random() < 0.8:
            tree[inner] = dict(tree[inner])
            tree, key = tree[inner], pick(rng, list(tree[inner]))
        value, what = tree[key], rng.integers(6)
        if what == 0:
            del tree[key]
        elif what == 1:
            tree[f"{key}x"] = tree.pop(key)
        elif isinstance(value, torch.Tensor) and what < 5:
            forms = (
                value.flatten()[:1], value.to(pick(rng, (torch.float64, torch.int64, torch.bfloat16, torch.complex64))),
                value.float() * float("nan"), value[None], torch.zeros(0), value.to_sparse() if value.ndim else value,
                value.float() * float("inf"), torch.empty(value.shape, device="meta"),
            )  # fmt: skip
            tree[key] = pick(rng, forms)
        elif isinstance(value, list) and value and what < 5:
            tree[key] = pick(rng, (value[:-1], value + value[:1], value[::-1], [*value[1:], odd_value(rng)]))
        elif isinstance(value, bool):
            tree[key] = not value
        elif isinstance(value, (int, float)) and what < 5:
            tree[key] = pick(rng, (value + 1, -value, float(value), value * 1000, 0))
        else:
            tree[key] = odd_value(rng)

    def _pickle(self, rng: Rng) -> bytes:
        """The archive with its pickle damaged or replaced, or a bare pickle, that may ask for code to be run."""
        inside = pick(rng, (pickle.dumps(_Runs()), pickle.dumps({"state_dict": _Runs()}), b"cos\nsystem\n(S'ls'\ntR."))
        if rng.random() < 0.2:
            return inside
        source, buffer = zipfile.ZipFile(io.BytesIO(self.content)), io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for item in source.namelist():
                content = source.read(item)
                if item.endswith("data.pkl"):
                    content = inside if rng.random() < 0.2 else damage_bytes(rng, content, 3)
                elif rng.random() < 0.02:
                    continue
                archive.writestr(item, content)
        return buffer.getvalue()

    def run(self, case: Case, folder: Path) -> None:
        """Scores must be finite and of the stated classes."""
        classifier = Classifier.load(folder / "m.ckpt")
        (prediction,) = classifier([self.image])
        scores = list(prediction.scores.values())
        if list(prediction.scores) != list(classifier.class_names) or len(scores) != len(classifier.class_names):
            raise Silence(f"scores of {list(prediction.scores)}")
        if not np.isfinite(scores).all():
            raise Silence(f"scores {scores} without a word")


class _Runs:
    """Asks whoever unpickles it to run something harmless that the target would notice."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1/0",)
