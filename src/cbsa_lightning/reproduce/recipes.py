"""Recipes of the paper's tables: the complete configuration of one run, merged from overlays.

A recipe is a single YAML file, which ``cbsa fit --config recipe.yaml`` can also run. The folder name of a cell contains
a hash of its recipe. Tables with the same cell therefore share it, and a changed setting creates a new cell.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbsa_lightning.arguments import constructor_arguments
from cbsa_lightning.cli.class_paths import class_named
from cbsa_lightning.cli.overlays import Settings, merged, read
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.reproduce.paper import Row, Setting, share_text

WITHOUT_EFFECT = (
    *("trainer.accelerator", "trainer.devices", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.logger", "report", "labels", "report_page", "wandb", "predictions"),
    *("data.num_workers", "data.image_cache", "data.feature_cache.folder", "data.feature_cache.limit_gb"),
)
"""Settings that do not affect the results. They are excluded from the hash, so that cells can move between machines."""


@dataclass(frozen=True)
class DataSet:
    """A data set of a table.

    Attributes:
        name: A name of the paper (voc, coco, nuswide) or any other name.
        file: The overlay.
    """

    name: str
    file: Path

    @classmethod
    def named(cls, text: str, configs: Path) -> DataSet:
        """Parses "voc", which means ``configs/data/voc.yaml``, or "voc=my_voc.yaml"."""
        name, _, file = text.partition("=")
        return cls(name, Path(file) if file else configs / "data" / f"{name}.yaml")


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        row: The system.
        data: Name of the data set.
        share: p, the labeled fraction of the training images, or the fraction of known labels.
        seed: Seed of the run.
        recipe: The configuration of the run, except its output folder.
        setting: The argument of the data module that ``share`` sets.
    """

    row: Row
    data: str
    share: float
    seed: int
    recipe: Settings
    setting: Setting = "labeled_fraction"

    @property
    def name(self) -> str:
        """Description for messages, such as "CAP on voc, p = 0.05, seed 1"."""
        return f"{self.row.label} on {self.data}, {share_text(self.setting, self.share)}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of the run's folder, which is the same for equal recipes."""
        plain = copy.deepcopy(self.recipe)
        for path in WITHOUT_EFFECT:
            *parents, last = path.split(".")
            place: Any = plain
            for key in parents:
                place = place.get(key) or {}
            place.pop(last, None)
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]
        kind = "p" if self.setting == "labeled_fraction" else "known"
        return (
            f"{self.data}-{kind}{round(1000 * self.share):03d}-seed{self.seed}-{'+'.join(self.row.overlays)}-{digest}"
        )


def make_cell(
    row: Row,
    data: DataSet,
    share: float,
    seed: int,
    configs: Path,
    extra: Iterable[Path] = (),
    clip: tuple[str, str] | None = None,
    setting: Setting = "labeled_fraction",
) -> Cell:
    """Builds a cell from overlays.

    Overlays are merged in this order: the method, the data set, settings of the method for this data set, ablations of
    the method, and ``extra``. The settings of the row, the fraction and the seed are applied last.

    Args:
        row: The system.
        data: The data set.
        share: Labeled fraction, or fraction of known labels.
        seed: Seed of the run.
        configs: Folder that contains ``methods/``.
        extra: Additional overlays, such as hardware settings.
        clip: Model and weights that replace those of systems with a CLIP.
        setting: The argument of the data module that ``share`` sets.

    Raises:
        ConfigError: If an overlay is missing or is not a mapping, or if the overlays do not name a module and data.
    """
    files = [configs / "methods" / f"{name}.yaml" for name in row.overlays]
    special = [configs / "methods" / data.name / f"{name}.yaml" for name in row.overlays]
    there = [file for file in special if file.is_file()]
    # Settings for this data set override the method, and ablations override both.
    recipe = merged(read(file) for file in (files[0], data.file, *there, *files[1:], *extra))
    for place in classes_of(recipe):
        if clip is not None and takes(place, "clip"):
            place["init_args"].update(clip=clip[0], pretrained=clip[1])
    recipe["model"]["init_args"].update(row.settings)
    recipe["seed_everything"] = seed
    recipe["data"][setting] = share
    return Cell(row, data.name, share, seed, recipe, setting)


def classes_of(recipe: Settings) -> list[Settings]:
    """Returns the settings of the module and, if the recipe has them, of its network and the network's word vectors.

    Returns:
        Parts of ``recipe``, each with ``class_path`` and ``init_args``.

    Raises:
        ConfigError: If the recipe has no data or no module.
    """
    model = recipe.get("model")
    if not isinstance(model, dict) or "class_path" not in model or not isinstance(recipe.get("data"), dict):
        raise ConfigError(
            "The overlays of a cell must name a model (class_path) and data. If an overlay only modifies a method, "
            "combine the two, as in cbsa+cbsa_safe."
        )
    found = [model]
    for name in ("network", "words"):
        arguments = found[-1].setdefault("init_args", {})
        if name in arguments:
            if isinstance(arguments[name], str):
                arguments[name] = {"class_path": arguments[name]}
            found.append(arguments[name])
    found[-1].setdefault("init_args", {})
    return found


def takes(place: Settings, argument: str) -> bool:
    """Returns whether the class of a mapping from :func:`classes_of` accepts an argument of this name.

    Raises:
        ConfigError: If the class does not exist.
    """
    return argument in constructor_arguments(class_named(place["class_path"]))
