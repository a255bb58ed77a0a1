"""``cbsa check`` beside the data module: they must refuse the same data sets."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.checks.checking import check
from cbsa_lightning.data.checks.report import text_of, write_json
from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.data.image_check import refuse_unreadable
from cbsa_lightning.data.plan import RunSettings
from cbsa_lightning.data.readers.table import Table
from cbsa_lightning.errors import CBSAError
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, damage_bytes, pick

_IMAGES = 10
_LABELS = ("cat", "dog", "cat;dog", "dog;bird", "none", "", "")


class Checks(Target):
    """``check`` and ``SSMLLDataModule`` on tables of images of which some are missing, damaged or repeated."""

    name, share, seconds = "check", 6, 20.0

    def draw(self, rng: Rng) -> Case:
        """Images, a training table, sometimes a test table, and settings that may not fit."""
        seeds = rng.integers(_IMAGES, size=_IMAGES) if rng.random() < 0.2 else range(_IMAGES)
        images = [_image(int(seed)) for seed in seeds]
        files = {f"{i}.png": content for i, content in enumerate(images)}
        for name in rng.choice(list(files), int(rng.integers(3)) if rng.random() < 0.5 else 0, replace=False):
            files[str(name)] = damage_bytes(rng, files[str(name)])
        files["train.csv"] = _table(rng, int(rng.integers(5, _IMAGES + 1)), "" if rng.random() < 0.9 else "gone/")
        if has_test := rng.random() < 0.4:
            files["test.csv"] = _table(rng, int(rng.integers(1, 4)), "")
        settings = {
            "batch_size": int(pick(rng, (2, 4, 4, 8))),
            "labeled_fraction": pick(rng, (*[None] * 6, 0.0, 0.5, 1.0)),
            "held_out_fraction": pick(rng, (None, None, 0.3, 0.3, 0.5, 0.0, 1.0)),
            "on_error": pick(rng, ("stop", "stop", "skip")),
            "labeled_per_batch": pick(rng, (None, None, None, 1, 4)),
        }
        return Case(files, {"settings": settings, "test": has_test}, ("train.csv", ".png", *settings, "labeled"))

    def run(self, case: Case, folder: Path) -> None:
        """The report must be complete, and name an error where, and only where, the data module refuses."""
        settings = case.options["settings"]
        test = str(folder / "test.csv") if case.options["test"] else None
        source = Table(str(folder / "train.csv"), test)
        report = check(source.train(), source.test(), RunSettings(**settings))
        text_of(report)
        write_json(report, io.StringIO())
        try:
            _set_up(Table(str(folder / "train.csv"), test), settings)
        except CBSAError as error:
            if not report.errors:
                raise Silence(f"not reported, but refused by a fit: {error}") from error
            return
        leaks = all(finding.kind == "leak" for finding in report.errors)  # copies, which a fit does not look for
        if not leaks:
            raise Silence(f"reported, but not refused by a fit: {report.errors}")


def _image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _table(rng: Rng, rows: int, folder: str) -> bytes:
    chosen = rng.choice(_IMAGES, rows, replace=False)
    lines = [f"{folder if rng.random() < 0.1 else ''}{i}.png,{pick(rng, _LABELS)}" for i in chosen]
    return os.linesep.join(["image,labels", *lines]).encode()


def _set_up(source: Table, settings: dict[str, object]) -> None:
    """What `cbsa fit` does with a data set before its first step."""
    data = SSMLLDataModule(source, image_size=16, num_workers=0, **settings)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    split = data.split
    read = np.concatenate([split.labeled, split.unlabeled, split.held_out])
    tables: list[tuple[AnnotationTable, np.ndarray]] = [(data.train_table, read)]
    if data.test_table is not None:
        tables.append((data.test_table, np.arange(len(data.test_table))))
    if settings["on_error"] == "stop":
        refuse_unreadable(tables)
    data.train_dataloader()
    data.val_dataloader()
