"""Settings: of the data module, given in Python; and whole configurations, given to the command line's parser."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from PIL import Image

from cbsa_lightning.cli.config_files import check_configs, naming_files
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.data.readers.table import Table
from fuzz.harness import Case, Refusal, Silence, Target
from fuzz.mutations import Rng, damage_text, damage_tree, encoded, odd_text, pick

_WHOLE = (0, 1, -1, 2, 3, 5, 7, 8, 100, 2**31, 2**32, 2**63, -(2**31))
_REAL = (0.0, 0.1, 0.5, 0.9, 1.0, 1.5, -0.1, 1e-9, 1e300, float("nan"), float("inf"), -float("inf"))


def write_tiny_table(folder: Path) -> None:
    """Twelve images, and a table with labels for eight of them."""
    rows = ["image,cat,dog"]
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{i % 2},{int(i % 3 == 0)}" if i < 8 else f"{i}.png,,")
    (folder / "t.csv").write_text("\n".join(rows))
    (folder / "full.csv").write_text("\n".join(rows[:9]))


class DataSettings(Target):
    """``SSMLLDataModule`` with values of the right type and no sense: set up, and one batch of each loader."""

    name, share, seconds = "data settings", 3, 20.0

    def prepare(self, folder: Path) -> None:
        """Writes images and a table."""
        write_tiny_table(folder)

    def draw(self, rng: Rng) -> Case:
        """Some settings changed."""
        whole, real = (lambda: int(pick(rng, _WHOLE))), (lambda: float(pick(rng, _REAL)))
        odd: dict[str, Any] = {
            "image_size": lambda: int(pick(rng, (0, -1, 1, 2, 8, 16, 10**6))),
            "labeled_fraction": real,
            "held_out_fraction": real,
            "seed": whole,
            "batch_size": whole,
            "labeled_per_batch": whole,
            "warmup_batch_size": whole,
            "eval_batch_size": whole,
            "strong_view": real,
            "num_workers": lambda: int(pick(rng, (0, -1))),
            "predict": lambda: odd_text(rng).lstrip("/."),  # or it would search the whole disk
            "split_file": lambda: odd_text(rng).lstrip("/."),
            "fast_decode": lambda: True,
        }
        keys = [str(key) for key in rng.choice(list(odd), int(rng.integers(1, 4)), replace=False)]
        chosen = {key: odd[key]() for key in keys}
        caches = {"limit": real(), "views": whole()} if rng.random() < 0.2 else {}
        table = "full.csv" if "labeled_fraction" in chosen else "t.csv"
        return Case({}, {"settings": chosen, "caches": caches, "table": table}, (*chosen, *_WORDS))

    def run(self, case: Case, folder: Path) -> None:
        """A batch of each loader must come with finite images of the size asked for."""
        plain: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": 0}
        given = {**plain, **case.options["settings"]}
        if case.options["caches"]:
            ImageCache(str(folder / "cache"), limit_gb=case.options["caches"]["limit"])
            FeatureCache(str(folder / "cache"), case.options["caches"]["views"], case.options["caches"]["limit"])
        data = SSMLLDataModule(Table(str(folder / case.options["table"])), **given)
        data.prepare_data()
        data.setup("fit")
        size = given["image_size"]
        batch = next(iter(data.train_dataloader()))
        if batch.images.shape[1:] != (3, size, size):
            raise Silence(f"images of shape {tuple(batch.images.shape)}")
        next(iter(data.weak_dataloader(0)))
        next(iter(data.val_dataloader()))
        if data.predict is not None:
            data.predict_table()


# An error about settings may speak of what they mean; the places are checked loosely here.
_WORDS = (
    "image_size", "fraction", "held", "seed", "batch", "strong_view", "num_workers", "limit_gb", "labeled",
    "the split file does not exist", "the table does not exist", "correct the path", "size of a view",
    "cannot be read as a split",
)  # fmt: skip


class Configs(Target):
    """Whole configurations in YAML, given to the parser of the ``cbsa`` command."""

    name, share, seconds = "configs", 3, 30.0

    def prepare(self, folder: Path) -> None:
        """Builds the parser once: that takes longer than a parse."""
        from cbsa_lightning.cli import lightning_cli

        here = Path.cwd()
        os.chdir(folder)
        write_tiny_table(folder)
        try:
            with mock.patch.object(lightning_cli.CBSACLI, "instantiate_classes"):
                cli = lightning_cli.make_cli(
                    ["--model=cbsa_lightning.CBSAModule", "--data.source=Digits", "--data.source.root=x"], run=False
                )
        finally:
            os.chdir(here)
        self.parser = cli.parser

    @staticmethod
    def _tree() -> dict[str, Any]:
        return {
            "seed_everything": 1,
            "model": {
                "class_path": "cbsa_lightning.CBSAModule",
                "init_args": {
                    "clip": "embedded", "num_contexts": 2, "prompt_length": 4, "decoder_feedforward": 16,
                    "warmup_epochs": 3, "ema_decay": 0.98, "labeler": "cbsa_lightning.method.stacking.StackedProbes",
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                },
            },
            "data": {
                "source": {
                    "class_path": "cbsa_lightning.data.readers.table.Table",
                    "init_args": {"train": "t.csv"},
                },
                "image_size": 64, "batch_size": 4, "num_workers": 0,
                "strong_view": {"class_path": "CutoutRandAugment", "init_args": {"cutout": 0.25}},
                "image_cache": {"folder": "cache", "limit_gb": 1.0},
            },
            "trainer": {
                "max_epochs": 2, "accelerator": "cpu",
                "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            },
            "compare": False,
        }  # fmt: skip

    def draw(self, rng: Rng) -> Case:
        """A tree damaged as such, as text or as bytes."""
        tree = self._tree()
        if rng.random() < 0.85:
            tree = damage_tree(rng, tree, 2)
        try:
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        except yaml.YAMLError:
            text = repr(tree)
        if rng.random() < 0.15:
            text = damage_text(rng, text)
        content = encoded(rng, text) if rng.random() < 0.3 else text.encode("utf-8", "surrogatepass")
        return Case({"c.yaml": content}, {}, ())

    def run(self, case: Case, folder: Path) -> None:
        """The parser must take it, or refuse it by naming a key or the file."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                words = ["--config", str(folder / "c.yaml")]
                check_configs(words)  # as make_cli does first
                with naming_files(words):
                    self.parser.parse_args(words)
        except SystemExit as error:
            message = said.getvalue().rpartition("error:")[2]  # what stands before is how to use the command
            case.places = ("c.yaml", *_KEYS)
            raise Refusal(message) from error


# The keys of the tree above, as jsonargparse writes them: in quotes, behind dots, in capitals, or listed as required.
_KEYS = (
    "--config", "'model", "'data", "'trainer", '"model', '"data', '"trainer', "compare", "seed_everything", "Option '",
    "Key ", "in keys: ", "nested key: ", "required: ",
)  # fmt: skip
