"""What a run logs to W&B, read from the records of an offline run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from sklearn.metrics import average_precision_score

from cbsa_lightning.__main__ import main
from cbsa_lightning.callbacks.monitors import logged_names
from cbsa_lightning.callbacks.wandb_log import LogToWandb, _log_files, define_metrics
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.inference.labels.image_labels import doubt_of
from cbsa_lightning.reports.class_heat_maps import MEASURES
from layouts import make_voc
from tiny_tables import CONFIGS
from wandb_records import OfflineRun, offline_runs

TABLES = {"report/images", "report/classes", "report/pseudo_labels"}
CHARTS = {"report/precision_recall", "report/reliability"}
PICTURES = {"predictions", "attention", "classes", "contexts", "precision_recall", "reliability", "pseudo_labels"}


def words(folder: Path, clip: Path, *more: str) -> list[str]:
    files = [f"--config={CONFIGS / f'{name}.yaml'}" for name in ("methods/cbsa", "data/voc", "loggers/wandb")]
    settings = (
        f"model.init_args.clip={clip} model.init_args.prompt_length=2 model.init_args.decoder_feedforward=16 "
        "model.init_args.warmup_epochs=1 data.image_size=64 data.num_workers=0 data.labeled_fraction=0.5 "
        f"data.source.init_args.root={folder / 'voc'} trainer.max_epochs=3 trainer.accelerator=cpu "
        "trainer.limit_train_batches=2 trainer.enable_progress_bar=false trainer.enable_model_summary=false "
        "report.num_images=2 wandb.num_images=6"
    )
    return [*files, *(f"--{setting}" for setting in settings.split()), *more]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Any:
    """Runs a fit of three epochs, the first of which is the warm-up."""
    folder = tmp_path_factory.mktemp("fitted")
    make_voc(folder / "voc")
    with pytest.MonkeyPatch.context() as patch:
        wandb.teardown()  # the service resolves relative paths, and would use the folder of an earlier test
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DATA_DIR", str(folder))
        cli = main(["fit", *words(folder, clip_folder, "--compare=true")])
        wandb.finish()
    (run,) = offline_runs(folder)
    return SimpleNamespace(cli=cli, run=run, folder=folder / cli.trainer.log_dir)


def predictions_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_does_not_get_the_name_of_another_logger(fitted: Any) -> None:
    assert not fitted.run.run.display_name  # W&B chooses the name


def test_metrics_have_the_epoch_as_their_axis(fitted: Any) -> None:
    run: OfflineRun = fitted.run
    known = set(logged_names(fitted.cli.model))
    logged = {key for key in run.keys if key.startswith(("val/", "pseudo/", "context/", "time/"))}
    assert logged >= {"val/mAP", "val/OF1", "pseudo/precision", "context/coverage", "time/ms_per_image"}
    for key in logged & known:
        assert run.metrics[key].step_metric == "epoch", key
        assert run.metrics[key].options.hidden == key.startswith("val/AP/"), key
    assert logged <= known
    epochs = [step["epoch"] for step in run.history if "val/mAP" in step]
    assert epochs == [0, 1, 2]


def test_the_summary_has_the_last_and_the_highest_mAP(fitted: Any) -> None:
    values = [step["val/mAP"] for step in fitted.run.history if "val/mAP" in step]
    assert fitted.run.summary["val/mAP"] == {"last": pytest.approx(values[-1]), "max": pytest.approx(max(values))}


def test_the_history_has_all_tables_and_charts_once(fitted: Any) -> None:
    keys = {key for key in fitted.run.keys if key.startswith(("report/", "pictures/", "Custom"))}
    charts = {f"Custom Chart Tables/{key}_table" for key in CHARTS}
    assert keys == TABLES | charts | {f"pictures/{name}" for name in PICTURES | {"training"}}
    for key in TABLES | charts:
        assert sum(key in step for step in fitted.run.history) == 1


def test_the_table_of_images_can_be_filtered_by_score(fitted: Any) -> None:
    table = fitted.run.table("report/images")
    data = fitted.cli.datamodule
    names, validation = data.class_names, data.eval_table()
    fixed = ["file", "thumbnail", "why", "truth", "predicted", "doubt"]
    assert table["columns"] == [*fixed, *(f"score/{name}" for name in names)]
    assert 2 <= len(table["data"]) <= 6
    by_file = {row["image"]: row for row in predictions_of(fitted.folder)}
    files = [row[0] for row in table["data"]]
    assert len(set(files)) == len(files)
    for row in table["data"]:
        labels = validation.labels[validation.paths.tolist().index(row[0])]
        assert row[3] == ", ".join(name for name, label in zip(names, labels, strict=True) if label == 1)
        predicted = by_file[row[0]]
        assert row[4] == ("" if predicted["labels"] == "none" else predicted["labels"].replace(";", ", "))
        scores = np.array(row[6:], dtype=np.float64)
        np.testing.assert_allclose(scores, [float(predicted[name]) for name in names], atol=1e-4)
        assert row[5] == pytest.approx(float(doubt_of(scores[None])[0]), abs=0.05)
        assert max(row[1]["width"], row[1]["height"]) <= 128
        (thumbnail,) = (files[row[1]["path"]] for _, files in fitted.run.artifacts.values() if row[1]["path"] in files)
        assert Image.open(thumbnail).size == (row[1]["width"], row[1]["height"])
    reasons = ", ".join(row[2] for row in table["data"])
    assert "worst" in reasons
    assert "most doubtful" in reasons


def test_the_table_of_classes(fitted: Any) -> None:
    table = fitted.run.table("report/classes")
    assert table["columns"] == ["class", "AP", "precision", "recall", "positives", "threshold"]
    assert [row[0] for row in table["data"]] == list(fitted.cli.datamodule.class_names)
    rows, truths = predictions_of(fitted.folder), fitted.cli.datamodule.eval_table().labels
    cuts = fitted.cli.model.decision_thresholds()
    for (name, average, _, _, positives, threshold), truth, cut in zip(table["data"], truths.T, cuts, strict=True):
        scores, known = np.array([float(row[name]) for row in rows]), truth >= 0
        assert positives == (truth == 1).sum()
        expected = average_precision_score(truth[known], scores[known]) if positives else None
        assert average == (pytest.approx(expected) if positives else None)
        assert threshold == (pytest.approx(float(cut)) if cut.isfinite() else None)


def test_the_pseudo_labels_of_each_class_and_epoch(fitted: Any) -> None:
    table = fitted.run.table("report/pseudo_labels")
    assert table["columns"] == ["epoch", "class", *MEASURES]
    names = list(fitted.cli.datamodule.class_names)
    assert [row[:2] for row in table["data"]] == [[epoch, name] for epoch in (1, 2) for name in names]
    model = fitted.cli.model
    last = {row[1]: dict(zip(MEASURES, row[2:], strict=True)) for row in table["data"] if row[0] == 2}
    unlabeled = model.pseudo_labels[fitted.cli.datamodule.split.unlabeled].cpu().numpy()
    truth = fitted.cli.datamodule.hidden_targets().numpy()
    for k, name in enumerate(names):
        found, pseudo, true = last[name], unlabeled[:, k], truth[:, k]
        assert found["positives"] == (pseudo == 1).sum()
        assert found["coverage"] == pytest.approx((pseudo >= 0).mean())
        for tau in ("tau_pos", "tau_neg"):
            value = getattr(model, tau)[k]
            assert found[tau] == (pytest.approx(float(value)) if value.isfinite() else None)
        assert found["context"] == int(model.context_partition[k]) + 1
        hits = ((pseudo == 1) & (true == 1)).sum()
        for measure, whole in (("precision", (pseudo == 1).sum()), ("recall", (true == 1).sum())):
            assert found[measure] == (pytest.approx(hits / whole) if whole else None)
    assert (fitted.folder / "pictures" / "pseudo_labels.png").is_file()


def test_the_curves(fitted: Any) -> None:
    curves = fitted.run.table("Custom Chart Tables/report/precision_recall_table")
    assert curves["columns"] == ["class", "recall", "precision"]
    assert 1 <= len({row[0] for row in curves["data"]}) <= 10
    points = fitted.run.table("Custom Chart Tables/report/reliability_table")
    assert points["columns"] == ["step", "lineKey", "lineVal"]
    assert {row[1] for row in points["data"]} == {"calibrated", "measured"}


def test_artifacts(fitted: Any) -> None:
    run = fitted.run
    own = {name: (kind, set(files)) for name, (kind, files) in run.artifacts.items() if kind != "run_table"}
    assert own == {
        "split": ("dataset", {"split.json"}),
        f"model-{run.run.run_id}": ("model", {"last.ckpt"}),
        f"predictions-{run.run.run_id}": ("predictions", {"predictions.csv", "labels.csv"}),
        f"report-{run.run.run_id}": ("report", {"report.html"}),
    }
    # The page is written again after the comparison.
    page = run.artifacts[f"report-{run.run.run_id}"][1]["report.html"].read_text()
    assert "trained on the labeled images only" in page
    assert page == (fitted.folder / "report.html").read_text()


def test_an_online_run_uses_the_split_as_an_input(tmp_path: Path) -> None:
    """An offline run raises an error instead, so this part needs a stand-in for the W&B run."""
    calls: list[tuple[str, str, str]] = []

    def named(method: str) -> Any:
        return lambda artifact: calls.append((method, artifact.name, artifact.type))

    (tmp_path / "split.json").write_text("{}")
    online = SimpleNamespace(id="7", offline=False, use_artifact=named("use"), log_artifact=named("log"))
    _log_files(online, "split", "dataset", [tmp_path / "split.json", tmp_path / "missing.json"], shared=True)
    _log_files(online, "report", "report", [tmp_path / "split.json"])
    _log_files(online, "model", "model", [tmp_path / "missing.ckpt"])
    assert calls == [("use", "split", "dataset"), ("log", "report-7", "report")]


@pytest.fixture(scope="module")
def visible(tmp_path_factory: pytest.TempPathFactory) -> dict[int, set[str]]:
    """Returns the visible series of short runs with 3 and with 80 classes, one of whose names looks like a pattern."""
    found = {}
    for count in (3, 80):
        folder = tmp_path_factory.mktemp(f"classes{count}")
        classes = ["a*b", "St. Bernard", *(f"class {k}" for k in range(count - 2))]
        module = SimpleNamespace(class_names=classes[1:], stack_share=0, specificity=None, num_contexts=0)
        names = logged_names(module)
        run = wandb.init(project="test", dir=folder, mode="offline", settings=wandb.Settings(init_timeout=600))
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)  # Lightning's definition
        define_metrics(run, [*names, "val/AP/a*b"])
        for epoch in range(2):
            run.log({**dict.fromkeys(names, 0.5), "epoch": epoch, "trainer/global_step": 10 * epoch})
        run.finish()
        (offline,) = offline_runs(folder)
        assert len(offline.keys) == len(names) + 2
        found[count] = offline.visible()
    return found


def test_the_number_of_visible_series_does_not_depend_on_the_number_of_classes(visible: Any) -> None:
    assert visible[80] == visible[3]
    assert {"val/mAP", "pseudo/precision", "train/loss", "time/ms_per_image"} < visible[80]
    assert not [key for key in visible[80] if key.startswith("val/AP/") or key == "epoch"]


def test_fewer_images_than_reasons_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"wandb\.num_images must be an integer of at least 3, got 2"):
        LogToWandb(num_images=2)


def test_a_run_without_report_logs_its_files(tmp_path: Path, clip_folder: Path, monkeypatch: Any) -> None:
    wandb.teardown()  # the service resolves relative paths, and would use the folder of the earlier test
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    make_voc(tmp_path / "voc")
    off = [f"--{name}.enabled=false" for name in ("report", "labels", "report_page")]
    main(["fit", *words(tmp_path, clip_folder, *off, "--trainer.max_epochs=1", "--model.init_args.num_contexts=0")])
    wandb.finish()
    (run,) = offline_runs(tmp_path)
    assert not [key for key in run.keys if key.startswith(("report/", "pictures/"))]
    assert {name.partition("-")[0] for name in run.artifacts} == {"split", "model"}
    assert json.loads((tmp_path / "runs/cbsa/version_0/split.json").read_text())
