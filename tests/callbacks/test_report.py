"""RunReport writes the results of the averaged weights, and writes nothing if it is disabled."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from cbsa_lightning.callbacks.logged_pictures import log_pictures
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.training.cbsa import CBSAModule
from tiny_clip import tiny_clip

CURVES = {"precision_recall", "reliability", "training", "pseudo_labels"}
PICTURES = {"predictions", "attention", "classes", "contexts", *CURVES}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(str(tmp_path_factory.mktemp("digits")), num_train=24, num_test=9, image_size=64)


def fit(towers: Path, digits: Digits, report: RunReport, folder: Path, *loggers, epochs: int = 2, **settings):
    torch.manual_seed(0)
    data = SSMLLDataModule(digits, image_size=64, labeled_fraction=0.5, batch_size=8, eval_batch_size=4, num_workers=0)
    module = CBSAModule(
        data.class_names, clip=str(towers), num_contexts=settings.pop("num_contexts", 2), prompt_length=2,
        decoder_feedforward=8, semantic_alignment=settings.pop("semantic_alignment", True), warmup_epochs=1,
        ema_decay=0.5,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=list(loggers) or CSVLogger(folder, name="", version="run"),
        callbacks=[report], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module.eval(), data, trainer


@pytest.fixture(scope="module")
def run(towers, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    report = RunReport(num_images=4)
    patient = wandb.Settings(init_timeout=600)  # the W&B service starts slowly on a busy machine
    wandb_logger = WandbLogger(save_dir=folder, offline=True, project="test", settings=patient)
    loggers = CSVLogger(folder, name="", version="run"), wandb_logger
    module, data, trainer = fit(towers, digits, report, folder, *loggers)
    wandb_logger.experiment.finish()
    return module, data, trainer, report, folder


@pytest.fixture(scope="module")
def expected(run) -> np.ndarray:
    module, data, *_ = run
    table = data.eval_table()
    return module(torch.stack([PlainView(64)(decode(table.file(i))) for i in range(len(table))])).numpy()


def test_predictions_use_the_averaged_weights(run, expected):
    module, data, _, _, folder = run
    with (folder / "run" / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "labels", *data.class_names]
    assert [row[0] for row in rows] == data.eval_table().paths.tolist()
    scores = np.array([row[2:] for row in rows], dtype=np.float32)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    thresholds = module.decision_thresholds().numpy()
    assert [row[1] for row in rows] == [
        ";".join(name for name, given in zip(data.class_names, row, strict=True) if given)
        for row in scores >= thresholds
    ]


def test_plots_exist_and_are_not_blank(run):
    folder = run[-1] / "run" / "pictures"
    assert {file.stem for file in folder.iterdir()} == PICTURES
    for file in folder.iterdir():
        with Image.open(file) as image:
            assert min(image.size) > 150
            assert np.asarray(image.convert("L")).std() > 5


def test_history_contains_the_logged_metrics(run):
    report, folder = run[3], run[4]
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        logged = [
            (name, int(row["epoch"]), float(value))
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name in ("val/mAP", "val/mAP_raw", "train/loss", "pseudo/coverage")
        ]
    assert {(name, epoch) for name, epoch, _ in logged} >= {("val/mAP", 0), ("val/mAP", 1), ("train/loss", 1)}
    for name, epoch, value in logged:
        assert report.history[name][epoch] == pytest.approx(value, rel=1e-5)
    assert set(report.history["pseudo/coverage"]) == {1}
    resumed = RunReport()
    resumed.load_state_dict(report.state_dict())
    assert resumed.history == report.history


def test_the_history_of_the_classes_is_part_of_the_state(run):
    report = run[3]
    assert set(report.classes.epochs) == {1}  # the second stage
    resumed = RunReport()
    resumed.load_state_dict(report.state_dict())
    torch.testing.assert_close(resumed.classes.epochs, report.classes.epochs, rtol=0, atol=0, equal_nan=True)
    resumed.load_state_dict({"history": {}})  # of an earlier version
    assert resumed.classes.epochs == {}


def test_wandb_has_the_plots(run):
    media = next(run[-1].glob("wandb/offline-run-*/files/media"))
    assert {file.name.rsplit("_", 2)[0] for file in (media / "images" / "pictures").iterdir()} == PICTURES


def test_tensorboard_has_the_plots(run):
    """The tests run without TensorBoard, so a stand-in replaces its writer."""
    pictures = {}

    class Logger(TensorBoardLogger):
        def __init__(self):
            pass

        @property
        def experiment(self):
            return SimpleNamespace(
                add_image=lambda name, pixels, step, dataformats: pictures.update({name: (pixels, step, dataformats)})
            )

    file = run[-1] / "run" / "pictures" / "pseudo_labels.png"
    log_pictures(SimpleNamespace(loggers=[Logger()], global_step=7), {"pseudo_labels": file})
    pixels, step, order = pictures["pictures/pseudo_labels"]
    with Image.open(file) as image:
        assert pixels.shape == (image.height, image.width, 3)
    assert (step, order) == (7, "HWC")


def test_without_attention_and_contexts(towers, digits, tmp_path):
    fit(towers, digits, RunReport(3), tmp_path, epochs=1, num_contexts=0, semantic_alignment=False)
    names = {file.stem for file in (tmp_path / "run" / "pictures").iterdir()}
    assert names == {"predictions", "classes", *CURVES} - {"pseudo_labels"}  # one epoch, the warm-up


def test_without_validation_there_are_only_curves_and_contexts(towers, digits, tmp_path):
    fit(towers, digits, RunReport(), tmp_path, epochs=1, limit_val_batches=0)
    assert {file.stem for file in (tmp_path / "run" / "pictures").iterdir()} == {"contexts", "training"}
    assert not (tmp_path / "run" / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("report", "settings", "reason"),
    [(RunReport(), {"fast_dev_run": True}, "fast_dev_run"), (RunReport(enabled=False), {}, "report.enabled is false")],
)
def test_nothing_is_written_if_the_report_is_disabled(towers, digits, tmp_path, caplog, report, settings, reason):
    with caplog.at_level(logging.DEBUG, "cbsa_lightning"):
        fit(towers, digits, report, tmp_path, epochs=1, **settings)
    assert "No report: " in caplog.text
    assert reason in caplog.text
    assert not list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.rglob("predictions.csv"))


def test_a_report_without_images_is_refused():
    with pytest.raises(ConfigError, match="num_images must be an integer of at least 1, got 0"):
        RunReport(num_images=0)
