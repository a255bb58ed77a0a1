"""Label files of a run, and `cbsa label`."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from cbsa_lightning.__main__ import main
from cbsa_lightning.callbacks.labels import WriteLabels
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.labels.image_labels import read_labels
from cbsa_lightning.io.runs import set_folder
from cbsa_lightning.method.stacking import StackedProbes
from tiny_data import CLASSES, Squares, tiny_data, tiny_module, tiny_trainer

FILES = {"labels.csv", "next_to_label.csv", "suspicious_labels.csv"}


def fit(folder, clip, source, **settings):
    """Trains a run in ``folder`` with the checkpoint that Lightning writes by default."""
    writer = settings.pop("writer", None) or WriteLabels(budget=5)
    trainer = tiny_trainer(folder, max_epochs=2, callbacks=[writer])
    set_folder(trainer, folder)
    module, data = tiny_module(clip, **settings), tiny_data(source)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return module, data


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder, squares_folder):
    folder = tmp_path_factory.mktemp("labels") / "version_0"
    settings = {"labeler": StackedProbes(), "stack_share": 0.5}
    return folder, *fit(folder, clip_folder, Squares(squares_folder, train=40), **settings)


def test_every_unlabeled_image_has_the_labels_of_the_classifier(run):
    folder, module, data = run
    found = read_labels(folder / "labels.csv")
    rows = data.split.unlabeled
    assert found.images.tolist() == data.train_table.paths[rows].tolist()
    assert found.class_names == CLASSES
    classifier = Classifier.load(folder / "checkpoints" / "last.ckpt")
    files = [data.train_table.file(row) for row in rows]
    torch.testing.assert_close(torch.from_numpy(found.probabilities), classifier.scores(files), atol=1e-5, rtol=0)
    assert np.array_equal(found.given, found.probabilities >= module.decision_thresholds().numpy())
    assert 0 < found.review.sum() < found.review.size


def test_lists_contain_the_images_to_review(run):
    folder, module, data = run
    nexts = list(csv.DictReader((folder / "next_to_label.csv").open(encoding="utf-8")))
    found = read_labels(folder / "labels.csv")
    assert [row["image"] for row in nexts] == found.images[np.argsort(found.places)][:5].tolist()
    doubts = list(csv.DictReader((folder / "suspicious_labels.csv").open(encoding="utf-8")))
    labeled, known = data.split.labeled, data.labeled_targets().numpy()
    place = {str(data.train_table.paths[row]): i for i, row in enumerate(labeled)}
    left_out = module.left_out.numpy()
    for row in doubts:
        i, k = place[row["image"]], CLASSES.index(row["class"])
        assert row["given"] == ("yes" if known[i, k] == 1 else "no")
        assert float(row["wrong"]) == pytest.approx(1 - left_out[i, k] if known[i, k] else left_out[i, k], abs=1e-3)
    assert len(doubts) == (np.where(known == 1, 1 - left_out, left_out) >= 0.5).sum()


def test_out_of_fold_probabilities_come_from_probes_of_other_images(run, clip_folder, squares_folder):
    _, module, data = run
    assert module.left_out.shape == (len(data.split.labeled), len(CLASSES))
    assert ((module.left_out > 0) & (module.left_out < 1)).all()


def test_scores_that_are_not_probabilities_are_not_reviewed(tmp_path, clip_folder, squares_folder):
    fit(tmp_path / "run", clip_folder, Squares(squares_folder))
    assert not read_labels(tmp_path / "run" / "labels.csv").review.any()
    assert not (tmp_path / "run" / "suspicious_labels.csv").exists()


def test_label_files_can_be_disabled(tmp_path, clip_folder, squares_folder):
    fit(tmp_path / "run", clip_folder, Squares(squares_folder), writer=WriteLabels(enabled=False))
    assert not FILES & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("setting", [{"budget": 0}, {"sure": 1.5}, {"enabled": 1}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=f"labels.{next(iter(setting))}"):
        WriteLabels(**setting)


@pytest.mark.parametrize(
    ("tool", "name"),
    [("label-studio", "t.json"), ("cvat", "t.xml"), ("fiftyone", "t.json"), ("csv", "t.csv"), ("parquet", "t.parquet")],
)
def test_the_command_writes_files_for_a_tool(run, tmp_path, tool, name):
    output = tmp_path / name
    assert main(["label", str(run[0]), "--to", tool, "--output", str(output)]) == output
    count = len(run[2].split.unlabeled)
    if tool == "label-studio":
        tasks = json.loads(output.read_text())
        assert len(tasks) == count
        assert tasks[0]["predictions"][0]["model_version"].startswith(f"{run[0].parent.name}-version_0-")
        assert (tmp_path / "t.xml").exists()
    elif tool == "cvat":
        assert output.read_text().count("<image ") == count
    elif tool == "fiftyone":
        assert len(json.loads(output.read_text())["labels"]) == count
    else:
        assert len(read_labels(output).images) == count
    with pytest.raises(ConfigError, match="exists already"):
        main(["label", str(run[0]), "--to", tool, "--output", str(output)])


def test_the_command_writes_predictions_for_tasks_of_a_project(run, tmp_path, capsys):
    folder = run[0]
    words = ["label", str(folder), "--to", "label-studio", "--output"]
    tasks = json.loads(main([*words, str(tmp_path / "t.json")]).read_text())
    export = [{"id": 10 + i, "data": task["data"], "meta": {}, "annotations": []} for i, task in enumerate(tasks[1:])]
    (tmp_path / "export.json").write_text(json.dumps(export))
    words += [str(tmp_path / "p.json"), "--tasks", str(tmp_path / "export.json")]
    with pytest.raises(DataError, match="--label_config"):
        main(words)
    found = json.loads(main([*words, "--label_config", str(tmp_path / "t.xml")]).read_text())
    assert found == [{"task": 10 + i} | task["predictions"][0] for i, task in enumerate(tasks[1:])]
    said = capsys.readouterr().out
    assert "1 image of the run without a task" in said
    assert f"Predictions for {len(tasks) - 1} tasks" in said


def test_the_command_writes_image_sizes_for_cvat_if_the_folder_is_known(run, tmp_path, capsys):
    words = ["label", str(run[0]), "--to", "cvat", "--output"]
    assert " width=" not in main([*words, str(tmp_path / "a.xml")]).read_text()
    assert "The file contains no image sizes" in capsys.readouterr().out
    table = run[2].train_table
    count = len(run[2].split.unlabeled)
    assert main([*words, str(tmp_path / "b.xml"), "--root", str(table.root)]).read_text().count(" width=") == count
    assert " width=" not in main([*words, str(tmp_path / "c.xml"), "--root", str(tmp_path)]).read_text()
    assert f"{count} images below {tmp_path} are missing or unreadable" in capsys.readouterr().out


@pytest.mark.parametrize(("to", "option"), [
    ("csv", "--tasks"), ("csv", "--url"), ("csv", "--control"), ("csv", "--root"), ("label-studio", "--prefix"),
    ("label-studio", "--label_config"), ("label-studio", "--root"),
])  # fmt: skip
def test_options_without_effect_are_refused(run, tmp_path, to, option):
    output = tmp_path / ("t.csv" if to == "csv" else "t.json")
    with pytest.raises(ConfigError, match=f"{option} has no effect here"):
        main(["label", str(run[0]), "--to", to, "--output", str(output), option, "x"])


def test_the_command_labels_new_images_from_the_checkpoint_only(run, tmp_path, squares_folder):
    output = tmp_path / "new.csv"
    main(["label", str(run[0]), "--to", "csv", "--output", str(output), "--images", str(squares_folder / "test")])
    found = read_labels(output)
    files = sorted((squares_folder / "test").iterdir())
    assert sorted(found.images.tolist()) == sorted(file.name for file in files)
    scores = Classifier.load(run[0] / "checkpoints" / "last.ckpt").scores(
        [squares_folder / "test" / name for name in found.images.tolist()]
    )
    torch.testing.assert_close(torch.from_numpy(found.probabilities), scores, atol=1e-6, rtol=0)


def test_the_command_refuses_invalid_arguments(run, tmp_path):
    with pytest.raises(ConfigError, match=r"for cvat is \.xml"):
        main(["label", str(run[0]), "--to", "cvat", "--output", "t.json"])
    with pytest.raises(ConfigError, match="is not a finished run with unlabeled images"):
        main(["label", str(tmp_path), "--to", "csv", "--output", str(tmp_path / "t.csv")])
    with pytest.raises(ConfigError, match=r"last.ckpt does not exist"):
        main(["label", str(tmp_path), "--to", "csv", "--output", str(tmp_path / "t.csv"), "--images", str(tmp_path)])


def test_predict_needs_no_configuration(run, tmp_path, squares_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = run[0] / "checkpoints" / "last.ckpt"
    words = ["predict", f"--ckpt_path={checkpoint}", "--data.predict", str(squares_folder / "test")]
    assert main(words).name == "predictions.csv"
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open(encoding="utf-8")))
    classifier = Classifier.load(checkpoint)
    found = classifier([squares_folder / "test" / row["image"] for row in rows])
    assert [row["labels"] for row in rows] == [";".join(image.labels) or "none" for image in found]
    for row, image in zip(rows, found, strict=True):
        assert {name: float(row[name]) for name in CLASSES} == pytest.approx(image.scores, abs=1e-6)
    with pytest.raises(ConfigError, match=r"predictions.csv exists already"):
        main(words)
