"""`cbsa fit --init_from`: a new run starts from the weights of an earlier run and reports the changes."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score

from cbsa_lightning import CBSAModule
from cbsa_lightning.__main__ import main
from cbsa_lightning.callbacks.warm_start import _state
from cbsa_lightning.checkpoints.earlier_run import read_earlier
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.checkpoints.warm_start import Earlier, check_fits, take_over
from cbsa_lightning.data.labeled_images import LabeledImages
from cbsa_lightning.errors import CheckpointError, ConfigError, DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.reports.changes import Changes, label_changes
from tiny_clip import tiny_clip
from tiny_data import CLASSES, Squares

MODEL = {"num_contexts": 0, "prompt_length": 2, "decoder_layers": 1, "decoder_heads": 4, "decoder_feedforward": 8}
FUSED = {"labeler": "cbsa_lightning.method.stacking.StackedProbes", "stack_share": 0.5}


def write_table(file, source, labeled, classes=CLASSES, images=60):
    """Writes a table of the first images of the squares, the first of which have labels."""
    table = source.train()
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "labels"])
        for i in range(images):
            given = [c for c, label in zip(CLASSES, table.labels[i], strict=True) if label and c in classes]
            writer.writerow([table.file(i), ";".join(given) if i < labeled and given else ""])
    return file


@pytest.fixture(scope="module")
def source(squares_folder):
    return Squares(squares_folder, train=60)


def settings(clip, table, **model):
    """Returns the configuration of a run of two epochs on a table."""
    return {
        "model": {
            "class_path": "cbsa_lightning.CBSAModule",
            "init_args": {"clip": str(clip), "warmup_epochs": 1, "ema_decay": 0.5, **MODEL, **model},
        },
        "data": {
            "source": {
                "class_path": "cbsa_lightning.data.readers.table.Table",
                "init_args": {"train": str(table), "allow_outside": True},
            },
            **{"image_size": 64, "batch_size": 8, "num_workers": 0, "held_out_fraction": 0.5},
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "report": {"enabled": False},
    }


def fit(folder, config, *words):
    """Trains a run in ``folder`` and returns its CLI."""
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    place = f"{{save_dir: {folder.parent}, name: {folder.name}}}"
    logger = f"{{class_path: cbsa_lightning.training.loggers.RunLogger, init_args: {place}}}"
    return main(["fit", f"--config={file}", f"--trainer.logger={logger}", *words])


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, clip_folder, source):
    """A finished run with fused scores; 20 of its 60 images are labeled."""
    folder = tmp_path_factory.mktemp("earlier")
    table = write_table(folder / "photos.csv", source, 20)
    fit(folder / "run", settings(clip_folder, table, **FUSED))
    return folder / "run" / "version_0"


def fresh(clip, classes=CLASSES, **model):
    torch.manual_seed(7)
    return CBSAModule(list(classes), clip=str(clip), **{**MODEL, **model})


def taken_over(earlier_weights, module, partition=None):
    """Copies the weights of an earlier run; returns the message and the previous state."""
    own = _state(module)
    before = {name: value.clone() for name, value in own.items()}
    check_fits(earlier_weights, module.network, own, module.class_names)
    partition = torch.full((len(module.class_names),), -1) if partition is None else partition
    return take_over(earlier_weights, module.network, own, module.class_names, partition), before


def test_common_classes_start_from_the_averaged_weights(earlier, clip_folder):
    averaged = Classifier.load(earlier / "checkpoints" / "last.ckpt").network
    weights = read_earlier(str(earlier)).weights
    module = fresh(clip_folder, weights.class_names)
    taken_over(weights, module)
    expected = dict(averaged.named_parameters())
    for name, value in module.network.named_parameters():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("classes", [(*CLASSES[::-1], "pink"), CLASSES[1:], ("pink", *CLASSES[2:])])
def test_classes_are_matched_by_name(earlier, clip_folder, classes):
    averaged = Classifier.load(earlier / "checkpoints" / "last.ckpt").network
    module = fresh(clip_folder, classes)
    weights = read_earlier(str(earlier)).weights
    told, before = taken_over(weights, module)
    for name in ("target_prompts.words", "semantic_prompts.words"):
        now, there = _state(module)[name], averaged.state_dict()[name]
        for k, each in enumerate(classes):
            source = there[weights.class_names.index(each)] if each in CLASSES else before[name][k]
            assert torch.equal(now[k], source)
    assert ("New classes, which start from initial weights: pink." in told) == ("pink" in classes)
    gone = [name for name in weights.class_names if name not in classes]
    assert (f"Removed classes: {', '.join(gone)}." in told) == bool(gone)
    assert torch.equal(module.network.log_scale, averaged.log_scale)


@pytest.mark.parametrize(
    ("classes", "partition", "contexts", "same"),
    [
        (CLASSES, [0, 0, 1, 1, 1], 2, True),
        (CLASSES, [1, 1, 0, 0, 0], 2, True),
        (CLASSES[::-1], [1, 1, 1, 0, 0], 2, True),
        (CLASSES, [0, 1, 1, 1, 1], 2, False),
        (CLASSES, [0, 0, 1, 1, 2], 3, False),
        (CLASSES[:4], [0, 0, 1, 1], 2, False),
        ((*CLASSES, "pink"), [0, 0, 1, 1, 1, 1], 2, False),
        (CLASSES, [-1] * 5, 2, False),
    ],
)
def test_the_context_head_is_reused_only_with_the_same_partition(
    tmp_path, clip_folder, classes, partition, contexts, same
):
    old = fresh(clip_folder, num_contexts=2)
    weights = earlier_of(old, partition=[0, 0, 1, 1, 1])
    module = fresh(clip_folder, classes, num_contexts=contexts)
    told, before = taken_over(weights, module, torch.tensor(partition))
    number = {0: partition[list(classes).index("red")], 1: partition[list(classes).index("blue")]}
    for name in ("context_head.weight", "context_head.bias"):
        now = _state(module)[name]
        if same:
            assert all(torch.equal(now[number[k]], old.state_dict()[f"network.{name}"][k]) for k in (0, 1))
        else:
            assert torch.equal(now, before[name])
    assert (" and the context head." in told) == same
    assert ("Not reused: the context head, because the partition of the classes differs." in told) != same


def earlier_of(module, partition=None):
    """Returns the earlier run of a module's checkpoint."""
    checkpoint = {"state_dict": dict(module.state_dict()), "read_from": "old.ckpt"}
    with torch.no_grad():
        for name, value in checkpoint["state_dict"].items():
            if name.startswith("network."):
                checkpoint["state_dict"][name] = value + 0.25
                module.state_dict()[name].copy_(value + 0.25)
    if partition is not None:
        checkpoint["state_dict"]["context_partition"] = torch.tensor(partition)
    module.on_save_checkpoint(checkpoint)
    return Earlier.of(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_length": 3}, "model.prompt_length is 2 in the checkpoint and 3 in this run"),
        ({"shared_prompts": True}, "model.shared_prompts differs"),
        ({"decoder_layers": 2}, "is missing from the checkpoint.*config.yaml"),
        ({"semantic_alignment": False}, "is missing from this run"),
        ({"train_pool": False, "num_contexts": 0}, "is missing from this run"),
    ],
)
def test_errors_for_other_settings_contain_both_values(clip_folder, changes, message):
    weights, module = earlier_of(fresh(clip_folder)), fresh(clip_folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        check_fits(weights, module.network, _state(module), module.class_names)


def test_other_towers_are_refused(tmp_path, clip_folder):
    weights = earlier_of(fresh(clip_folder))
    module = fresh(tiny_clip(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match=r"frozen weights sha256 \w+.*this run has sha256 \w+.*model.pretrained"):
        check_fits(weights, module.network, _state(module), module.class_names)


def test_another_class_of_network_is_refused(clip_folder):
    module = fresh(clip_folder)
    weights = earlier_of(module)._replace(network="DualCoOp")
    with pytest.raises(CheckpointError, match="from a DualCoOp; this run trains a CBSANetwork"):
        check_fits(weights, module.network, _state(module), module.class_names)


def test_networks_that_do_not_list_class_tensors_need_the_same_classes(clip_folder, monkeypatch):
    module = fresh(clip_folder, CLASSES[::-1])
    weights = earlier_of(fresh(clip_folder))
    monkeypatch.setattr(type(module.network), "class_tensors", lambda self: None)
    with pytest.raises(CheckpointError, match="does not define which of its weights belong to a class"):
        check_fits(weights, module.network, _state(module), module.class_names)


def test_a_run_on_an_extended_table_reports_the_changes(tmp_path, caplog, clip_folder, source, earlier):
    table = write_table(tmp_path / "grown.csv", source, 50)
    config = {**settings(clip_folder, table, **FUSED), "report": {"num_images": 1}}
    cli = fit(tmp_path / "new", config, "--init_from", str(earlier))
    assert "Training starts from the averaged weights of" in caplog.text
    data, module, folder = cli.datamodule, cli.model, tmp_path / "new" / "version_0"
    trained = LabeledImages.read(earlier / "labeled.parquet").trained()
    held_out = [str(data.train_table.file(row)) for row in data.split.held_out]
    assert len(held_out) == 25
    assert not trained & set(held_out)
    rows = {row["class"]: row for row in csv.DictReader((folder / "changes.csv").open())}
    truth = data.train_table.labels[data.split.held_out]
    for key, checkpoint in (
        ("AP_before", earlier / "checkpoints/last.ckpt"),
        ("AP_after", folder / "checkpoints/last.ckpt"),
    ):
        scores = Classifier.load(checkpoint).scores(held_out).numpy()
        for k, name in enumerate(module.class_names):
            number = int((truth[:, k] == 1).sum())
            assert rows[name]["positives"] == str(number)
            if number < 3:
                assert rows[name][key] == ""
            else:
                assert float(rows[name][key]) == pytest.approx(
                    average_precision_score(truth[:, k], scores[:, k]), abs=2e-3
                )
    page = (folder / "report.html").read_text()
    assert "Changes since the earlier run" in page
    assert "Measured on 25 validation images that neither run was trained on." in page
    before, now = source.train().labels[:20].sum(0), source.train().labels[:50].sum(0)
    for k, name in enumerate(CLASSES):
        assert [int(rows[name][c]) for c in ("labeled_before", "labeled_now", "labels_added", "labels_removed")] == [
            before[k],
            now[k],
            now[k] - before[k],
            0,
        ]


def test_removed_and_new_classes_are_listed_without_metrics(tmp_path, clip_folder, source, earlier):
    table = write_table(tmp_path / "grown.csv", source, 50, CLASSES[1:])
    fit(tmp_path / "new", settings(clip_folder, table, **FUSED), "--init_from", str(earlier / "checkpoints/last.ckpt"))
    rows = {row["class"]: row for row in csv.DictReader((tmp_path / "new/version_0/changes.csv").open())}
    assert rows["red"]["AP_before"] == rows["red"]["AP_after"] == ""
    assert int(rows["red"]["labels_removed"]) == source.train().labels[:20, 0].sum()


def test_networks_without_trained_parts_reuse_nothing(tmp_path, caplog, clip_folder, source):
    config = settings(clip_folder, write_table(tmp_path / "photos.csv", source, 30))
    network = {
        "class_path": "cbsa_lightning.networks.zero_shot.ZeroShotCLIP",
        "init_args": {"clip": str(clip_folder)},
    }
    labeler = {"class_path": "cbsa_lightning.method.stacking.StackedProbes"}
    init = {"network": network, "labeler": labeler, "stack_share": 1.0, "warmup_epochs": 0}
    config["model"] = {"class_path": "cbsa_lightning.training.module.SSMLLModule", "init_args": init}
    config["trainer"]["max_epochs"] = 1
    fit(tmp_path / "first", config)
    write_table(tmp_path / "photos.csv", source, 50)
    fit(tmp_path / "second", config, "--init_from", str(tmp_path / "first" / "version_0"))
    assert "Nothing is trained in this run" in caplog.text
    assert (tmp_path / "second" / "version_0" / "changes.csv").is_file()


def test_a_resumed_run_uses_its_own_weights_and_reports_changes(tmp_path, clip_folder, source, earlier):
    table = write_table(tmp_path / "grown.csv", source, 50)
    config = settings(clip_folder, table, **FUSED)
    whole = fit(tmp_path / "whole", config, "--init_from", str(earlier))
    config["trainer"]["max_steps"] = 3
    fit(tmp_path / "part", config, "--init_from", str(earlier))
    run = tmp_path / "part" / "version_0"
    resumed = main(["fit", "--resume", str(run), "--trainer.max_steps", "-1"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), resumed.model.state_dict()[name].nan_to_num()), name
    changes = (tmp_path / "whole/version_0/changes.csv").read_text()
    assert (run / "changes.csv").read_text() == changes


def test_init_from_excludes_resume_and_compare(tmp_path, clip_folder, source, earlier):
    config = settings(clip_folder, write_table(tmp_path / "grown.csv", source, 50), **FUSED)
    with pytest.raises(ConfigError, match="use only one of these options"):
        main(["fit", "--resume", str(earlier), "--init_from", str(earlier)])
    with pytest.raises(ConfigError, match="--compare false"):
        fit(tmp_path / "new", config, "--init_from", str(earlier), "--compare", "true")
    checkpoint = str(earlier / "checkpoints/last.ckpt")
    with pytest.raises(ConfigError, match="--ckpt_path resumes one"):
        fit(tmp_path / "new", config, "--init_from", str(earlier), "--ckpt_path", checkpoint)
    assert not (tmp_path / "new").exists()


def test_invalid_runs_are_refused_before_anything_is_written(tmp_path, clip_folder, source, earlier):
    config = settings(clip_folder, write_table(tmp_path / "grown.csv", source, 50))
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04")
    shutil.copytree(earlier, tmp_path / "damaged")
    (tmp_path / "damaged" / "labeled.parquet").write_bytes(b"PAR1")
    for place, error, message in (
        ("nowhere", CheckpointError, "does not exist"),
        ("empty", CheckpointError, "is not a run"),
        ("torn.ckpt", CheckpointError, "damaged"),
        ("damaged", DataError, "labeled.parquet"),
    ):
        with pytest.raises(error, match=message):
            fit(tmp_path / "new", config, "--init_from", str(tmp_path / place))
    with pytest.raises(CheckpointError, match="local files only"):
        fit(tmp_path / "new", config, "--init_from", "https://example.com/last.ckpt")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_without_its_run_is_reused_but_not_compared(tmp_path, clip_folder, source, earlier):
    shutil.copy(earlier / "checkpoints/last.ckpt", tmp_path / "alone.ckpt")
    config = settings(clip_folder, write_table(tmp_path / "grown.csv", source, 50), **FUSED)
    with pytest.warns(UserWarning, match="it is unknown which images .* was trained on"):
        fit(tmp_path / "new", config, "--init_from", str(tmp_path / "alone.ckpt"))
    assert not (tmp_path / "new/version_0/changes.csv").exists()


def test_images_of_another_size_are_refused(tmp_path, clip_folder, source, earlier):
    config = settings(clip_folder, write_table(tmp_path / "grown.csv", source, 50), **FUSED)
    config["data"]["image_size"] = 96
    with pytest.raises(CheckpointError, match="images of 64 pixels; this run uses 96"):
        fit(tmp_path / "new", config, "--init_from", str(earlier))


def test_checkpoints_name_the_class_of_their_network(earlier):
    assert read_checkpoint(earlier / "checkpoints/last.ckpt")["network_class"] == "CBSANetwork"


def test_labeled_images_are_stored_and_restored(tmp_path):
    labels = np.array([[1, 0], [0, -1]], np.int8)
    images = LabeledImages(
        ["a;b", "ü"], ["1.png", "x,2.png"], ["/d/1.png", "/d/x,2.png"], np.array([False, True]), labels
    )
    images.write(tmp_path / "labeled.parquet")
    found = LabeledImages.read(tmp_path / "labeled.parquet")
    assert (found.class_names, found.images, found.files) == (images.class_names, images.images, images.files)
    assert np.array_equal(found.labels, labels)
    assert found.trained() == {"1.png", "/d/1.png"}


def test_other_commands_hold_out_the_same_images(tmp_path, clip_folder, source, earlier):
    table = write_table(tmp_path / "grown.csv", source, 50)
    cli = fit(tmp_path / "new", settings(clip_folder, table, **FUSED), "--init_from", str(earlier))
    run = tmp_path / "new" / "version_0"
    words = ["validate", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]
    again = main([*words, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"])
    assert again.datamodule.split.digest == cli.datamodule.split.digest


def test_training_images_in_a_test_table_are_excluded(tmp_path, clip_folder, source, earlier):
    trained = LabeledImages.read(earlier / "labeled.parquet").trained()
    table = source.train()
    files = [str(table.file(row)) for row in range(50)]
    train = write_table(tmp_path / "grown.csv", source, 60)
    lines = train.read_text().splitlines()
    tested = [line for line in lines[1:] if line.split(",")[0] in files[:30]]
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *tested, ""]))
    unlabeled = [f"{table.file(row)}," for row in range(55, 60)]
    train.write_text("\n".join([lines[0], *(line for line in lines[1:56] if line not in tested), *unlabeled, ""]))
    config = settings(clip_folder, train, **FUSED)
    config["data"]["source"]["init_args"]["test"] = str(tmp_path / "test.csv")
    config["data"]["held_out_fraction"] = None
    with pytest.warns(UserWarning, match="trained on the labels of 10 validation images"):
        cli = fit(tmp_path / "new", config, "--init_from", str(earlier))
    rows = {row["class"]: row for row in csv.DictReader((tmp_path / "new/version_0/changes.csv").open())}
    fair = [row for row in range(30) if files[row] not in trained]
    assert len(fair) == 20
    for k, name in enumerate(CLASSES):
        assert int(rows[name]["positives"]) == table.labels[fair, k].sum()
    assert cli.datamodule.eval_table().paths.size == 30


def test_added_and_removed_labels_are_counted_by_image():
    def images(names, paths, labels):
        held_out = np.zeros(len(paths), bool)
        return LabeledImages(names, paths, [f"/d/{p}" for p in paths], held_out, np.array(labels, np.int8))

    before = images(["a", "b", "gone"], ["1", "2"], [[1, 0, 1], [1, 1, -1]])
    now = images(["b", "a", "new"], ["2", "3"], [[0, 1, 1], [1, 1, 0]])
    found = label_changes(["a", "b", "new", "gone"], before, now)
    assert found.tolist() == [[2, 2, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1]]


def test_classes_with_the_largest_changes_are_listed_with_positives():
    before, after = np.array([0.5, 0.5, np.nan, 0.9]), np.array([0.75, 0.4, np.nan, 0.9])
    changes = Changes(["a", "b", "c", "d"], before, after, np.array([9, 4, 1, 5]), None, 30, 2)
    assert changes.sentences() == [
        "Measured on 30 validation images that neither run was trained on (2 are skipped, since the earlier run was "
        "trained on their labels).",
        "mAP: 63.3 before, 68.3 after, over the 3 of 4 classes with at least 3 positives.",
        "Gained most, in points of AP: a +25.0 (9 positives).",
        "Lost most, in points of AP: b -10.0 (4 positives).",
    ]


def test_changes_without_positives_are_not_measured():
    nothing = np.full(1, np.nan)
    told = Changes(["a"], nothing, nothing, np.zeros(1, int), np.zeros((1, 4), int), 30, 0).sentences()
    assert told[1] == "mAP is not measured, since no shared class has 3 positives."
