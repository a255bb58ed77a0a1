"""Recipes of the paper's tables: the whole configuration of one run, merged from overlays.

A recipe is one YAML that ``cbsa fit --config recipe.yaml`` runs as well. A cell's folder is named after what its recipe
says, so that two tables with the same cell share it, and a changed setting makes a new one.
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
    *("trainer.logger", "report", "labels", "report_page", "predictions"),
    *("data.num_workers", "data.image_cache", "data.feature_cache.folder", "data.feature_cache.limit_gb"),
)
"""Settings that change no number of a run, so that another machine finds the same cell."""


@dataclass(frozen=True)
class DataSet:
    """A data set of a table: ``name`` is the paper's (voc, coco, nuswide) or one's own, ``file`` its overlay."""

    name: str
    file: Path

    @classmethod
    def named(cls, text: str, configs: Path) -> DataSet:
        """From "voc", which means ``configs/data/voc.yaml``, or "voc=my_voc.yaml"."""
        name, _, file = text.partition("=")
        return cls(name, Path(file) if file else configs / "data" / f"{name}.yaml")


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        row: The system.
        data: Name of the data set.
        share: p, the labeled share of the training images, or the share of known labels.
        seed: Of everything.
        recipe: The run's whole configuration but for where it writes.
        setting: The argument of the data module that the share is of.
    """

    row: Row
    data: str
    share: float
    seed: int
    recipe: Settings
    setting: Setting = "labeled_fraction"

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.row.label} on {self.data}, {share_text(self.setting, self.share)}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Folder of the run; the same recipe has the same."""
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
    """A cell from the overlays: method, data set, what a method needs there, ``extra`` ones; then share and seed.

    Args:
        row: The system.
        data: The data set.
        share: Labeled share, or share of known labels.
        seed: Of everything.
        configs: Folder with ``methods/``.
        extra: Overlays over all of them, such as hardware.
        clip: Model and weights for systems that have a CLIP, instead of their own.
        setting: The argument of the data module that the share is of.

    Raises:
        ConfigError: An overlay is not there or no mapping, or they name no module and data.
    """
    files = [configs / "methods" / f"{name}.yaml" for name in row.overlays]
    special = [configs / "methods" / data.name / f"{name}.yaml" for name in row.overlays]
    there = [file for file in special if file.is_file()]
    # What a method needs on this data set stands above the method, and below its ablations.
    recipe = merged(read(file) for file in (files[0], data.file, *there, *files[1:], *extra))
    for place in classes_of(recipe):
        if clip is not None and takes(place, "clip"):
            place["init_args"].update(clip=clip[0], pretrained=clip[1])
    recipe["model"]["init_args"].update(row.settings)
    recipe["seed_everything"] = seed
    recipe["data"][setting] = share
    return Cell(row, data.name, share, seed, recipe, setting)


def classes_of(recipe: Settings) -> list[Settings]:
    """Lists the recipe's module, its network and the network's word vectors, as far as it has them.

    Returns:
        Parts of ``recipe``, each with ``class_path`` and ``init_args``.

    Raises:
        ConfigError: The recipe has no data or no module.
    """
    model = recipe.get("model")
    if not isinstance(model, dict) or "class_path" not in model or not isinstance(recipe.get("data"), dict):
        raise ConfigError(
            "The overlays of a cell must name a model (class_path) and data. An overlay that goes over a method is a "
            "row together with it, such as cbsa+cbsa_safe."
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
    """Whether the class of a place of :func:`classes_of` has such an argument.

    Raises:
        ConfigError: There is no such class.
    """
    return argument in constructor_arguments(class_named(place["class_path"]))
