"""Every system of the paper's tables trains, validates, saves, loads and predicts on the embedded data."""

from __future__ import annotations

import csv
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cbsa_lightning import Classifier
from cbsa_lightning.__main__ import main
from cbsa_lightning.cli.class_paths import class_named
from cbsa_lightning.reproduce.cells import make, result_of
from cbsa_lightning.reproduce.paper import SYSTEMS, TABLES, Row
from cbsa_lightning.reproduce.recipes import Cell, DataSet, make_cell

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ABLATIONS = tuple(row for row in TABLES[3].rows if row.label in ("TP", "TP + SAA"))
IMAGENET = ("BCE", "ASL", "CAP", "CAP + ML-Decoder")
ROWS = (*SYSTEMS, *ABLATIONS, Row("CAP + ML-Decoder", ("cap_ml_decoder",)))
# The others have the network of DualCoOp or of BCE, with another loss or labeler, which a prediction does not need.
OWN_NETWORK = tuple(row for row in ROWS if row.label not in ("ASL", "CAP", "Top-1*", "Top-k*", "IAT*"))

DIGITS = """
data:
  source:
    class_path: cbsa_lightning.data.readers.digits.Digits
    init_args: {root: digits, num_train: 60, num_test: 24}
  image_size: 160
"""
SHORT = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
data: {num_workers: 0, batch_size: 16, labeled_per_batch: 4, warmup_batch_size: 8}
model: {init_args: {warmup_epochs: 1}}
report: {enabled: false}
"""
KEPT = "data: {feature_cache: {folder: cache, strong_views: 1}}"
SMALL_RESNET = """
data: {image_size: 64}
model: {init_args: {network: {init_args: {backbone: test_resnet.r160_in1k, pretrained: random}}}}
"""


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to a temporary folder, because a run writes data and features to the working folder."""
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    overlays = {"digits": DIGITS, "short": SHORT, "kept": KEPT, "resnet": SMALL_RESNET}
    for name, text in overlays.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def finished(row: Row, folder: Path) -> tuple[Cell, dict[str, Any]]:
    """Runs the cell of a row with one epoch of warm-up and one of the second stage; keeps its checkpoint."""
    imagenet = row.label in IMAGENET
    extra = [folder / "short.yaml", folder / ("resnet.yaml" if imagenet else "kept.yaml")]
    data = DataSet("digits", folder / "digits.yaml")
    cell = make_cell(row, data, 0.3, 1, CONFIGS, extra, ("embedded", "openai"))
    assert make(cell, folder / "out", keep_checkpoint=True)
    found = result_of(cell, folder / "out")
    assert found is not None
    return cell, found


@pytest.mark.parametrize("row", ROWS, ids=[row.label for row in ROWS])
def test_trains_validates_saves(row: Row, folder: Path) -> None:
    _, found = finished(row, folder)
    history = found["history"]
    assert set(history["val/mAP"]) == {"0", "1"}
    assert 0 < history["val/mAP"]["1"] < 1
    assert np.isfinite(history["train/loss"]["1"])
    assert set(history["time/ms_per_image"]) == {"0", "1"}  # both epochs are measured
    learns_from_labels_alone = row.label in ("BCE", "ASL")
    assert (history["train/loss_unsup"]["1"] == 0) == learns_from_labels_alone
    # Every system with pseudo-labels logs their CF1.
    assert ("pseudo/CF1" in history) == (not learns_from_labels_alone)
    assert ("train/loss_aux" in history) == (row.label == "Ours")


@pytest.mark.parametrize("row", OWN_NETWORK, ids=[row.label for row in OWN_NETWORK])
def test_loads_predicts(row: Row, folder: Path) -> None:
    """The checkpoint predicts through the command line, and alone, with the same scores."""
    cell, _ = finished(row, folder)
    recipe, checkpoint = (folder / "out" / cell.folder / name for name in ("recipe.yaml", "last.ckpt"))
    images = sorted((folder / "digits").rglob("*.png"))[:5]
    table = folder / "five.csv"
    table.write_text("image\n" + "\n".join(map(str, images)) + "\n")
    arguments = [f"--config={recipe}", f"--ckpt_path={checkpoint}", "--trainer.logger=false"]
    main(["predict", *arguments, f"--data.predict={table}", f"--predictions.output={folder / cell.folder}.csv"])
    rows = list(csv.DictReader((folder / f"{cell.folder}.csv").open()))
    classifier = Classifier.load(checkpoint)
    scores = np.array([[float(row[name]) for name in classifier.class_names] for row in rows])
    np.testing.assert_allclose(classifier.scores(images).numpy(), scores, atol=2e-3)


def test_recipes_differ_only_in_the_system(folder: Path) -> None:
    """Rows that are compared have the same data, stages and average; rows of CAP use CAP's optimizer."""
    data = DataSet("digits", folder / "digits.yaml")
    cells = [make_cell(row, data, 0.3, 1, CONFIGS) for row in ROWS if row.label not in IMAGENET]
    for cell in cells:
        recipe, first = cell.recipe, cells[0].recipe
        assert {k: v for k, v in recipe.items() if k != "model"} == {k: v for k, v in first.items() if k != "model"}
        own = {"network", "labeler", "num_contexts", "semantic_alignment", "train_pool", "clip", "pretrained"}
        arguments = recipe["model"]["init_args"]
        assert set(arguments) - own == {"warmup_epochs"}
        assert arguments["warmup_epochs"] == 8


def test_recipes_can_be_run_as_yaml_files(folder: Path) -> None:
    cell, _ = finished(SYSTEMS[-1], folder)
    assert yaml.safe_load((folder / "out" / cell.folder / "recipe.yaml").read_text()) == cell.recipe


def test_the_example_of_the_documentation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the example of docs/how_to/own_system.md: a custom system in one Python file and one YAML file."""
    text = (CONFIGS.parent / "docs" / "how_to" / "own_system.md").read_text()
    code, overlay = (re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0] for language in ("python", "yaml"))
    assert len((code + overlay).splitlines()) <= 30
    (folder / "my_systems.py").write_text(code)
    configs = folder / "configs"
    shutil.copytree(CONFIGS, configs)
    (configs / "methods" / "linear_probe.yaml").write_text(overlay)
    monkeypatch.syspath_prepend(folder)
    rest = ["--config", "short.yaml", "kept.yaml", "--clip", "embedded", "--shares", "0.3", "--keep_checkpoints"]
    rows = ["--rows", "DualCoOp", "linear_probe"]
    file = main(["table", "1", "--data", "digits=digits.yaml", "--out", "own", *rest, *rows])
    assert re.search(r"\| linear_probe \| \d+\.\d \|", file.read_text())
    (checkpoint,) = (folder / "own").glob("*linear_probe*/last.ckpt")
    classifier = Classifier.load(checkpoint, network=partial(class_named("my_systems.LinearProbe"), clip="embedded"))
    images = sorted((folder / "digits").rglob("*.png"))[:3]
    assert len(classifier(images)) == 3
