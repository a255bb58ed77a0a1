"""Cells of the paper's tables: one system, data set, labelled share and seed; each a run of its own, made once.

A cell's recipe is one YAML, merged from overlays, that ``cbsa fit --config recipe.yaml`` runs as well. Its folder is
named after what the recipe says, so that two tables with the same cell share it, and a changed setting makes a new one.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import json
import math
import os
import platform
import pydoc
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import WandbLogger

import cbsa_lightning
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.lightning_cli import make_cli
from cbsa_lightning.paper import Row

Settings = dict[str, Any]

WITHOUT_EFFECT = (
    *("trainer.accelerator", "trainer.devices", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.logger", "report", "predictions"),
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
        share: p, the labelled share of the training images.
        seed: Of everything.
        recipe: The run's whole configuration but for where it writes.
    """

    row: Row
    data: str
    share: float
    seed: int
    recipe: Settings

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.row.label} on {self.data}, p = {self.share:.2f}, seed {self.seed}"

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
        return f"{self.data}-p{round(1000 * self.share):03d}-seed{self.seed}-{'+'.join(self.row.overlays)}-{digest}"


def make_cell(
    row: Row,
    data: DataSet,
    share: float,
    seed: int,
    configs: Path,
    extra: Iterable[Path] = (),
    clip: tuple[str, str] | None = None,
) -> Cell:
    """A cell from the overlays: method, data set, what a method needs there, ``extra`` ones; then share and seed.

    Args:
        row: The system.
        data: The data set.
        share: Labelled share.
        seed: Of everything.
        configs: Folder with ``methods/``.
        extra: Overlays over all of them, such as hardware.
        clip: Model and weights for systems that have a CLIP, instead of their own.

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
    recipe["data"]["labelled_fraction"] = share
    return Cell(row, data.name, share, seed, recipe)


def classes_of(recipe: Settings) -> list[Settings]:
    """The recipe's module and, if it has one, its network, as places with ``class_path`` and ``init_args``.

    Raises:
        ConfigError: The recipe has no data or no module.
    """
    model = recipe.get("model")
    if not isinstance(model, dict) or "class_path" not in model or not isinstance(recipe.get("data"), dict):
        raise ConfigError(
            "The overlays of a cell must name a model (class_path) and data. An overlay that goes over a method is a "
            "row together with it, such as cbsa+cbsa_safe."
        )
    arguments = model.setdefault("init_args", {})
    if "network" not in arguments:
        return [model]
    if isinstance(arguments["network"], str):
        arguments["network"] = {"class_path": arguments["network"]}
    arguments["network"].setdefault("init_args", {})
    return [model, arguments["network"]]


def takes(place: Settings, argument: str) -> bool:
    """Whether the class of a place of :func:`classes_of` has such an argument.

    Raises:
        ConfigError: There is no such class.
    """
    try:
        found = pydoc.locate(place["class_path"])
    except pydoc.ErrorDuringImport as error:
        raise ConfigError(f"{place['class_path']} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"There is no class {place['class_path']}; is its module on PYTHONPATH?")
    return argument in inspect.signature(found).parameters


def read(file: Path) -> Settings:
    """An overlay.

    Raises:
        ConfigError: It is not there, or no mapping.
    """
    if not file.is_file():
        raise ConfigError(
            f"There is no overlay {file}. Start where the project's configs/ lies, or say where it is with --configs."
        )
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} must be a mapping such as 'trainer: {{max_epochs: 40}}', not {found!r}.")
    return found


def merged(overlays: Iterable[Settings]) -> Settings:
    """Overlays one over the other, as the command line merges ``--config`` files.

    But for one thing: another class begins with no arguments here, while the command line hands on those of the class
    below that it has too.
    """
    return reduce(_over, overlays, {})


def _over(below: Settings, above: Settings) -> Settings:
    """``above`` over ``below``; another class begins with no arguments."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, dict) and set(value) == {"init_args"}:
            old = {"class_path": old}  # a class by its path alone
        if isinstance(old, dict) and "class_path" in old and value == old["class_path"]:
            continue  # the same class by its path alone keeps its arguments
        if isinstance(old, dict) and isinstance(value, dict) and not _other_class(old, value):
            result[key] = _over(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _other_class(old: Settings, new: Settings) -> bool:
    return "class_path" in new and new["class_path"] != old.get("class_path")


def result_of(cell: Cell, out: Path) -> Settings | None:
    """What a finished cell found, or None."""
    file = out / cell.folder / "result.json"
    found: Settings | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def make(cell: Cell, out: Path, keep_checkpoint: bool = False) -> bool:
    """Runs a cell, from its last checkpoint on if it was stopped; a finished one is left alone.

    Several processes may work in the same ``out``: a cell that another one has in hand is left to it.

    Returns:
        Whether it is finished now.
    """
    folder = out / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if result_of(cell, out) is None:
                write_whole(folder / "result.json", json.dumps(_run(cell, folder), indent=1))
                if not keep_checkpoint:
                    (folder / "last.ckpt").unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def busy(cell: Cell, out: Path) -> bool:
    """Whether a process has the cell in hand."""
    folder = out / cell.folder
    if not folder.is_dir():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def refuse_ranks() -> None:
    """Refuses to be one of several processes of a run: each would do the same cells.

    Raises:
        ConfigError: torchrun or the like started this process.
    """
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("A cell runs in one process: start `cbsa table` once a GPU, without torchrun.")


def _run(cell: Cell, folder: Path) -> Settings:
    refuse_ranks()
    trainer = cell.recipe.get("trainer", {})
    epochs, every = trainer.get("max_epochs"), trainer.get("check_val_every_n_epoch") or 1
    if not epochs or epochs % every:
        raise ConfigError(
            f"max_epochs is {epochs} and check_val_every_n_epoch {every}: the last epoch would not be validated, and "
            "there would be nothing to report. Let the latter divide the former."
        )
    recipe, here = folder / "recipe.yaml", folder / "here.yaml"
    write_whole(recipe, yaml.safe_dump(cell.recipe, sort_keys=False))
    write_whole(here, yaml.safe_dump(_here(folder, "logger" in trainer), sort_keys=False))
    checkpoint = folder / "last.ckpt"
    resume = [f"--ckpt_path={checkpoint}"] if checkpoint.is_file() else []
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # the cell's own
        try:
            cli = make_cli(["fit", f"--config={recipe}", f"--config={here}", *resume])
        except SystemExit as error:  # jsonargparse says why and leaves
            raise ConfigError(f"{recipe} cannot be run: see the message above.") from error
    found = _found(cli, time.monotonic() - begun)
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # else the next cell would go on in this run
    del cli
    gc.collect()  # a Trainer and its module know each other; the next cell needs the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"cell": cell.name, "row": cell.row.label, "data": cell.data, "share": cell.share, "seed": cell.seed} | found


def _here(folder: Path, has_logger: bool) -> Settings:
    """Where and how a cell runs: on one device, all into its folder, one checkpoint an epoch, the last."""
    trainer: Settings = {"devices": 1}
    if not has_logger:
        logger = {"save_dir": str(folder), "name": "log"}  # a folder a start below it
        trainer["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}
    # Not save_last, which lightning 2.6 obeys only where another checkpoint is written too, or training ends.
    checkpoint = {
        **{"dirpath": str(folder), "filename": "last", "enable_version_counter": False},
        **{"monitor": None, "save_top_k": 1, "save_last": False},
        "save_on_train_epoch_end": True,  # after the report has taken the epoch's figures
    }
    return {"trainer": trainer, "checkpoint": checkpoint}


def _found(cli: Any, seconds: float) -> Settings:
    """What a finished run tells: every metric of every epoch, and what they were measured on."""
    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, RunReport))
    last = cli.trainer.max_epochs - 1
    if last not in report.history.get("val/mAP", {}):
        raise ConfigError(
            f"The run ended without a validation in its last epoch, {last}; no callback or limit may stop it early."
        )
    data = cli.datamodule
    test = data.eval_table()
    gpu = cli.trainer.strategy.root_device.type == "cuda"
    return {
        "positives": dict(zip(test.class_names, (test.labels == 1).sum(0).tolist(), strict=True)),
        "history": {
            name: {epoch: None if math.isnan(value) else value for epoch, value in values.items()}
            for name, values in report.history.items()
        },
        "measured_on": "held-out labelled images" if len(data.split.held_out) else "test images",
        "images": [data.train_table.digest(), test.digest()],
        "seconds_since_last_start": seconds,
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "versions": {"cbsa_lightning": cbsa_lightning.__version__, "torch": torch.__version__},
    }


def write_whole(file: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
