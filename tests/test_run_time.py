"""`cbsa check --time`: its counts are those of a run, and its unit times are measured."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from cbsa_lightning import __main__ as cli
from cbsa_lightning.data.caches.feature_cache import FeatureCache, Tower
from cbsa_lightning.data.checks import run_time
from cbsa_lightning.data.checks.run_time import Request, RunTime, Units, estimate, kept_views, scored_images
from cbsa_lightning.data.plan import Plan, RunSettings, Stage, make_plan
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import CBSAError, ConfigError
from cbsa_lightning.method.labelers import Evidence, EvidenceLabeler, LabeledOnly
from cbsa_lightning.reproduce.unit_times import unit_times
from layouts import write_image, write_rows
from tiny_data import Squares, tiny_data, tiny_fit

UNITS = Units(
    trains=True,
    frozen=True,
    cached=True,
    strong_views=2,
    evidence=False,
    labels_once=False,
    warmup_epochs=3,
    max_epochs=8,
    validated_every=4,
    loaders=2,
    overlaps=False,
    images=8,
    steps=3,
    read=0.5,
    plain=0.25,
    strong=1.0,
    tower=2.0,
    head=0.125,
    step={4: 10.0, 6: 20.0},
)
"""Of no machine, but easy to reckon with."""

PLAN = Plan(
    split=Split(range(5), range(5, 15), [15, 16]),
    images=20,
    test_images=7,
    validated_on="held-out images",
    validated=2,
    validated_classes=3,
    warmup=Stage(steps_per_epoch=2, labeled=4, unlabeled=0, epochs=3),
    second=Stage(steps_per_epoch=3, labeled=2, unlabeled=4, epochs=5),
)


def test_estimate_by_hand() -> None:
    found = estimate(PLAN, UNITS)
    # Plain views of 5 + 10 + 2 images and 7 test images, 10 mirrored ones, two strong ones of 15 images.
    assert found.views == 24 + 10 + 30
    assert found.features == 64 * 2.0 + (24 * 0.75 + 30 * 1.0) / 2
    assert found.training_steps == 3 * 2 + 5 * 3
    assert found.steps == 6 * 10.0 + 15 * 20.0
    # Two validations; six passes for thresholds; zero-shot CLIP before, predictions and labels after training.
    assert found.scored == 2 * 2 + 6 * 10 + 2 + 2 + 10
    assert found.passes == (found.scored + 2 * 2) * 0.125
    assert found.total == found.features + found.steps + found.passes


def test_without_a_cache_images_are_read_for_each_step_and_pass() -> None:
    kept, plain = estimate(PLAN, UNITS), replace(UNITS, cached=False, strong_views=0)
    found = estimate(PLAN, plain)
    assert (found.views, found.features, found.scored) == (0, 0, kept.scored)
    assert found.steps == kept.steps + (6 * 4 + 15 * 6) * 1.5 / 2
    assert found.passes == kept.passes + found.scored * (2.0 + 0.75 / 2)


def test_labels_of_images_without_cached_features_need_the_tower() -> None:
    found = estimate(replace(PLAN, second=Stage(3, 4, 0, 5)), UNITS)
    assert found.scored == 2 * 2 + 2 + 2 + 10
    assert found.passes == (found.scored + 2 * 2) * 0.125 + 10 * (2.0 + 0.75 / 2)


def test_a_separate_device_computes_while_images_are_read() -> None:
    beside = replace(UNITS, overlaps=True)
    assert beside.together(10.0, 6.0) == 10.0
    assert beside.together(10.0, 30.0) == 15.0
    assert UNITS.together(10.0, 30.0) == 25.0


def test_a_system_that_trains_nothing_has_no_steps() -> None:
    probes = replace(UNITS, trains=False, strong_views=0, evidence=True, labels_once=True, warmup_epochs=0, step={})
    found = estimate(PLAN, replace(probes, max_epochs=1, validated_every=1))
    assert (found.steps, found.training_steps, found.measured_steps) == (0, 0, 0)
    assert found.views == 34
    assert found.not_included == ("startup", "writing the report", "fitting the probes")
    # One validation; thresholds twice; descriptions of 15 + 2 images; predictions and labels.
    assert found.scored == 2 + 2 * 10 + 17 + 12


def test_sentence_with_the_estimate() -> None:
    excluded = ("startup", "writing the report", "fitting the probes")
    found = RunTime(480.2, 130.0, 59.6, 8480, 480, 900, 8, 3, excluded)
    assert found.sentence() == (
        "A run takes about 11 min here: 8 min for the features of 8,480 views, 2 min for 480 training steps, 60 s for "
        "900 images in validations and other passes (measured on 8 images and 3 steps). The estimate excludes "
        "startup, writing the report, and fitting the probes."
    )
    assert replace(found, not_included=excluded[:2]).sentence().endswith("excludes startup and writing the report.")
    alone = RunTime(18000.0, 0, 0, 10, 0, 0, 8, 0, ("startup",)).sentence()
    assert alone.endswith("excludes startup.")
    assert "5.0 h for the" in alone
    assert "steps" not in alone


@pytest.mark.parametrize(
    ("settings", "strong", "test", "alone"),
    [({}, 0, 7, False), ({"held_out_fraction": 0.3}, 3, 7, False), ({}, 2, 0, False), ({}, 2, 7, True)],
)
def test_kept_views_are_the_views_in_a_feature_cache(
    tmp_path: Path, settings: dict[str, Any], strong: int, test: int, alone: bool
) -> None:
    source = Squares(tmp_path, test=test)
    data: Any = tiny_data(source, feature_cache=FeatureCache(str(tmp_path / "cache"), strong), **settings)
    data.setup("fit")
    module = SimpleNamespace(trains=True, second_stage="labeled-only" if alone else "semi-supervised")
    data.trainer = SimpleNamespace(
        lightning_module=module, local_rank=0, num_devices=1, is_global_zero=True, progress_bar_callback=None
    )
    computed: list[int] = []

    def features(images: torch.Tensor) -> torch.Tensor:
        computed.append(len(images))
        return images[:, :, 0, 0].float()

    data.compute_features(Tower(features, "none", "32"))
    run = RunSettings(seed=data.seed, labeled_fraction=0.4, batch_size=8, labeled_only=alone, **settings)
    plan = make_plan(source.train(), source.test(), run)
    views, _ = kept_views(plan, replace(UNITS, strong_views=strong))
    assert views == sum(computed) - 1  # one to determine the shape


class Doubtful(EvidenceLabeler):
    """Returns one half for every label."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        return torch.full((len(evidence.descriptors[0]) - len(evidence.labeled), evidence.labels.shape[1]), 0.5)


class CountImages(L.Callback):
    """Counts images in the frozen tower during a fit."""

    number = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        compute = pl_module.network.features

        def counted(images: torch.Tensor) -> torch.Tensor:
            self.number += len(images)
            features: torch.Tensor = compute(images)
            return features

        pl_module.network.features = counted


@pytest.mark.parametrize(
    ("labeler", "contexts", "epochs", "every"),
    [(None, 2, 3, 1), (Doubtful(), 0, 4, 2), (Doubtful(), 0, 4, 3), (Doubtful(), 2, 3, 3), (LabeledOnly(), 0, 3, 1)],
)
def test_passes_equal_those_of_a_fit(
    tmp_path: Path, clip_folder: Path, labeler: Any, contexts: int, epochs: int, every: int
) -> None:
    count, source = CountImages(), Squares(tmp_path)
    sizes = {"batch_size": 11, "labeled_per_batch": 4, "warmup_batch_size": 8}  # the last batches are full
    settings: dict[str, Any] = {"labeler": labeler, "num_contexts": contexts, "data": sizes}
    trainer = {"callbacks": [count], "check_val_every_n_epoch": every}
    tiny_fit(tmp_path, clip_folder, source, max_epochs=epochs, trainer=trainer, **settings)
    evidence = isinstance(labeler, Doubtful)
    units = replace(UNITS, cached=False, evidence=evidence, labels_once=evidence and not contexts, warmup_epochs=1)
    units = replace(units, max_epochs=epochs, validated_every=every)
    run = RunSettings(seed=3, labeled_fraction=0.4, labeled_only=isinstance(labeler, LabeledOnly), **sizes)
    plan = make_plan(source.train(), source.test(), run)
    steps = ((plan.warmup, 1), (plan.second, epochs - 1))
    trained = sum(n * stage.steps_per_epoch * (stage.labeled + stage.unlabeled) for stage, n in steps)
    files = plan.validated + len(plan.split.unlabeled)  # predictions.csv and labels.csv, which this fit does not write
    assert count.number == scored_images(plan, units)[0] - files + trained


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 images, half of them labeled, and a configuration that trains the embedded CLIP on them."""
    monkeypatch.chdir(tmp_path)
    rows = [[f"{i}.png", ("cat;dog", "cat", "sofa;dog", "none")[i % 4] if i < 20 else ""] for i in range(40)]
    for i in range(40):
        write_image(tmp_path / f"{i}.png", seed=i)
    write_rows(tmp_path / "photos.csv", ["image", "labels"], rows)
    (tmp_path / "small.yaml").write_text(
        "model:\n  class_path: cbsa_lightning.CBSAModule\n"
        "  init_args: {clip: embedded, num_contexts: 0, warmup_epochs: 1}\n"
        "data: {image_size: 64, batch_size: 8, num_workers: 0, feature_cache: {folder: cache, strong_views: 1}}\n"
        "trainer: {max_epochs: 3, accelerator: cpu}\ncompare: true\n"
    )
    return tmp_path


def test_a_check_reports_the_time_of_a_run(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "small.yaml", "photos.csv", "--time", "--json"])
    found = json.loads(capsys.readouterr().out)
    time, run = found["time"], found["run"]
    assert time["views"] == 40 + 20 + 36  # plain, mirrored for unlabeled images, strong for training images
    steps = run["first_stage"]["steps_per_epoch"] + 2 * run["second_stage"]["steps_per_epoch"]
    assert time["training_steps"] == steps
    assert (time["measured_images"], time["measured_steps"]) == (8, 3)
    assert all(0 < time[part] < 600 for part in ("features", "steps", "passes"))
    assert time["seconds"] == pytest.approx(time["features"] + time["steps"] + time["passes"])
    assert time["not_included"] == ["startup", "writing the report", "the comparison (compare)"]
    assert not (photos / "cache").exists()
    assert not (photos / "runs").exists()


def recipe(photos: Path, **network: Any) -> dict[str, Any]:
    source = {"class_path": "cbsa_lightning.data.readers.Table", "init_args": {"train": str(photos / "photos.csv")}}
    network = {"clip": "embedded", "num_contexts": 0, **network}
    return {
        "model": {"class_path": "cbsa_lightning.CBSAModule", "init_args": network},
        "data": {"source": source, "image_size": 64, "batch_size": 8, "feature_cache": {"strong_views": 1}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }


def test_stacked_probes_have_no_steps(photos: Path) -> None:
    given = recipe(photos)
    given["model"] = {
        "class_path": "cbsa_lightning.SSMLLModule",
        "init_args": {
            "network": {
                "class_path": "cbsa_lightning.networks.zero_shot.ZeroShotCLIP",
                "init_args": {"clip": "embedded"},
            },
            "labeler": "cbsa_lightning.method.stacking.StackedProbes",
            "stack_share": 1.0,
        },
    }
    found = unit_times(Request(given, [0, 3], [8, 8], 1))
    assert (found.trains, found.strong_views, found.step, found.warmup_epochs) == (False, 0, {}, 0)
    assert found.evidence
    assert found.labels_once
    assert found.tower > 0


def test_an_image_cache_is_not_filled(photos: Path) -> None:
    given = recipe(photos, decoder_layers=1)
    given["data"]["image_cache"] = {"folder": str(photos / "cache")}
    found = unit_times(Request(given, [0], [4], 1))
    assert found.step[4] > 0
    assert not (photos / "cache").exists()


def test_images_that_a_run_skips_are_not_measured(photos: Path) -> None:
    (photos / "3.png").write_bytes(b"")
    given = recipe(photos)
    given["data"]["on_error"] = "skip"
    assert unit_times(Request(given, [0, 3], [], 1)).images == 1
    with pytest.raises(CBSAError, match="None of the sampled images"):
        unit_times(Request(given, [3], [], 1))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"clip": "RN51"}, "RN51"),
        ({"decoder_layers": "many"}, "decoder_layers.*many"),
        ({"loss": "no.loss"}, "no"),
    ],
)
def test_invalid_configurations_are_refused(photos: Path, network: dict[str, Any], message: str) -> None:
    with pytest.raises(CBSAError, match=message):
        unit_times(Request(recipe(photos, **network), [0], [4], 1))


def test_errors_of_the_measurement_are_reported(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess([], 0, 'Seed set to 1\n{"refused": "no such model"}\n', "")
    monkeypatch.setattr(run_time.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(ConfigError, match="The time of a run could not be measured: no such model"):
        cli.main(["check", "small.yaml", "photos.csv", "--time"])
    said = subprocess.CompletedProcess([], 1, "", "Traceback\nOutOfMemoryError: 3 GB")
    with pytest.raises(CBSAError, match="3 GB"):
        cli.main(["check", "small.yaml", "photos.csv", "--time"])


@pytest.mark.parametrize(
    ("config", "message"), [("data: {batch_size: 8}", "with a model"), ("trainer: {max_steps: 9}", "max_epochs")]
)
def test_a_run_of_unknown_length_or_model(
    photos: Path, monkeypatch: pytest.MonkeyPatch, config: str, message: str
) -> None:
    words = ["other.yaml", "photos.csv", "--time"]
    (photos / "other.yaml").write_text(config)
    if message == "max_epochs":
        words = ["small.yaml", *words]
        endless = replace(UNITS, max_epochs=-1)
        monkeypatch.setattr(run_time, "_measured", lambda request: endless)
    with pytest.raises(ConfigError, match=message):
        cli.main(["check", *words])


def test_nothing_is_measured_if_a_fit_would_be_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "3.png").unlink()
    with pytest.raises(SystemExit):
        cli.main(["check", "small.yaml", "photos.csv", "--time", "--json"])
    assert json.loads(capsys.readouterr().out)["time"] is None


def test_measured_images_are_spread_over_the_table(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def measured(request: Request) -> Units:
        asked.append(request)
        return replace(UNITS, step=dict.fromkeys(request.sizes, 1.0))

    monkeypatch.setattr(run_time, "_measured", measured)
    report = cli.main(["check", "small.yaml", "photos.csv", "--time"])
    (request,) = asked
    assert len(set(request.rows)) == 8
    assert np.ptp(request.rows) > 30
    stages = (report.plan.warmup, report.plan.second)
    assert request.sizes == [stage.labeled + stage.unlabeled for stage in stages]
