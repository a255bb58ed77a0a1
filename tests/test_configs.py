"""The command line parses every YAML file in configs/, and data sets can be fit on small generated files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cbsa_lightning.__main__ import main
from cbsa_lightning.cli.class_paths import class_named
from cbsa_lightning.cli.lightning_cli import make_cli
from cbsa_lightning.data.label_masks import LabelMask
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.linear_probe import LinearProbe
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.training.gain import Gain, GainCheck
from layouts import make_coco, make_cvat, make_label_studio, make_nuswide_list, make_table, make_voc
from parsed import parse

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LAYOUTS = {"voc": make_voc, "coco": make_coco, "nuswide": make_nuswide_list}


def files(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(CONFIGS / f"{name}.yaml"))]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in (*LAYOUTS, "table")}
    for name, make in LAYOUTS.items():
        make(folders[name])
    make_table(folders["table"], n_train=24, unlabeled=12)
    return folders


def fit(args: list[str], folder: Path, clip: Path, *more: str):
    """Fits a tiny CLIP for a few steps on the CPU, regardless of the epochs and sizes in the overlays."""
    return main(["fit", *args, *network_flags(clip), *run_flags(folder), *more])


def build(args: list[str], folder: Path, network: list[str], *more: str):
    """Builds data, module and Trainer without training."""
    return make_cli([*args, *network, *run_flags(folder), *more], run=False)


def network_flags(clip: Path) -> list[str]:
    return [
        f"--model.init_args.clip={clip}",
        "--model.init_args.prompt_length=2",
        "--model.init_args.decoder_feedforward=16",
    ]


def run_flags(folder: Path) -> list[str]:
    return [
        "--model.init_args.warmup_epochs=1",
        "--data.image_size=64",
        "--data.num_workers=0",
        "--data.eval_batch_size=16",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.limit_train_batches=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={folder}",
    ]


@pytest.mark.parametrize("name", ["voc", "coco", "nuswide", "table"])
def test_each_data_set_with_a_labeled_fraction(
    name: str, roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overlays = ["methods/cbsa", f"data/{name}"] + ([] if name == "table" else ["shares/p20"])
    where = (
        f"--data.source.init_args.train={roots[name] / 'train.csv'}"
        if name == "table"
        else f"--data.source.init_args.root={roots[name]}"
    )
    cli = fit(files(*overlays), tmp_path, clip_folder, where, "--report.enabled=false")
    metrics = cli.trainer.callback_metrics
    assert 0 <= metrics["val/mAP"] <= 1
    assert torch.isfinite(metrics["train/loss"])
    assert metrics["train/loss_unsup"] > 0
    assert "train/loss_aux" in metrics
    assert (cli.model.context_partition >= 0).all()
    # The folder of the run contains everything that is needed to repeat it.
    folder = Path(cli.trainer.log_dir)
    assert (folder / "config.yaml").is_file()
    assert (folder / "split.json").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("name", ["label_studio", "cvat"])
def test_exports_of_labeling_tools(
    name: str, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses each overlay unchanged, with its files in ``data``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    labels = {"label_studio": make_label_studio, "cvat": make_cvat}[name](tmp_path / "data")
    data = build(files("methods/cbsa", f"data/{name}"), tmp_path, network_flags(clip_folder)).datamodule
    data.setup("fit")
    assert data.class_names == ["cat", "dog", "zebra"]
    assert (data.train_table.labels == labels).all()
    assert len(data.split.unlabeled) == int((labels == -1).all(axis=1).sum())
    assert next(iter(data.train_dataloader())).images.shape[1:] == (3, 64, 64)


@pytest.mark.parametrize("share", ["p05", "p10", "p15", "p20"])
def test_overlays_of_shares_set_their_fraction(share: str, clip_folder: Path, tmp_path: Path) -> None:
    make_voc(tmp_path / "voc", n_train=40, n_test=12)
    root = f"--data.source.init_args.root={tmp_path / 'voc'}"
    overlays = files("methods/cbsa", "data/voc", f"shares/{share}")
    data = build(overlays, tmp_path, network_flags(clip_folder), root).datamodule
    data.setup("fit")
    assert data.labeled_fraction == int(share[1:]) / 100
    assert len(data.split.labeled) == int(int(share[1:]) / 100 * 40)


@pytest.mark.parametrize("method", ["labeled_only", "without_contexts", "target_prompts_only"])
def test_each_method(method: str, roots: dict[str, Path], clip_folder: Path, tmp_path: Path) -> None:
    root = f"--data.source.init_args.root={roots['voc']}"
    order = ["methods/cbsa", "data/voc", f"methods/{method}", "shares/p20"]
    module = build(files(*order), tmp_path, network_flags(clip_folder), root).model
    assert module.num_contexts == 0
    assert isinstance(module.labeler, LabeledOnly) == (method == "labeled_only")
    assert (module.network.decoder is None) == (method == "target_prompts_only")


def test_partial_labels(
    roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images are partly labeled, there are no pseudo-labels, and the run's folder contains the mask."""
    monkeypatch.chdir(tmp_path)
    order = ["methods/cbsa", "data/voc", "methods/without_contexts", "methods/partial_labels"]
    root = f"--data.source.init_args.root={roots['voc']}"
    cli = fit(files(*order), tmp_path, clip_folder, root, "--data.known_fraction=0.5", "--report.enabled=false")
    assert isinstance(cli.model.labeler, LabeledOnly)
    assert (cli.datamodule.train_table.labels < 0).any()
    mask = LabelMask.load(Path(cli.trainer.log_dir) / "label_mask.json", cli.datamodule.source.train())
    assert mask.digest == cli.datamodule.label_mask.digest


SYSTEMS = {  # each with a data set for which the original has specific settings, if there is one
    "dualcoop": "voc",
    "top_one": "voc",
    "top_k": "coco",
    "iat": "voc",
    "dualcoop_plus": "coco",
    "tai": "nuswide",
    "scpnet": "coco",
}


@pytest.mark.parametrize(("method", "data"), [*SYSTEMS.items(), ("scpnet", "nuswide"), ("cbsa", "coco")])
def test_each_compared_system(
    method: str, data: str, roots: dict[str, Path], clip_folder: Path, tmp_path: Path
) -> None:
    """Includes overlays with settings for one data set, such as coco/cbsa and nuswide/tai.

    ``test_systems.py`` trains each system.
    """
    own = [f"methods/{data}/{method}"] if (CONFIGS / "methods" / data / f"{method}.yaml").is_file() else []
    overlays = files(f"methods/{method}", f"data/{data}", *own, "shares/p20")
    tiny = network_flags(clip_folder)
    if method != "cbsa":
        tiny = [flag.replace("init_args", "init_args.network.init_args") for flag in tiny[:2]]
    module = build(overlays, tmp_path, tiny, f"--data.source.init_args.root={roots[data]}").model
    assert not isinstance(module.labeler, LabeledOnly)
    expected = {
        ("cbsa", "coco"): ("num_contexts", 6),
        ("dualcoop_plus", "coco"): ("normalized_winners", True),
        ("scpnet", "nuswide"): ("scale", 100.0),
        ("tai", "nuswide"): ("region_scale", 4.0),
    }
    if (method, data) in expected:
        name, value = expected[method, data]
        assert getattr(module.network, name) == value
    if method == "scpnet":
        assert int((module.network.graph[0] > 0).sum()) <= {"coco": 62, "nuswide": 50}[data]
    if method == "top_k":
        assert module.labeler.k == 3


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "stacked_probes"])
def test_each_system_without_training(
    method: str, roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [flag.replace("init_args", "init_args.network.init_args") for flag in network_flags(clip_folder)[:1]]
    root = f"--data.source.init_args.root={roots['voc']}"
    overlays = files(f"methods/{method}", "data/voc", "shares/p20")
    cli = main(["fit", *overlays, *tiny, root, *run_flags(tmp_path), "--report.num_images=1"])
    assert cli.trainer.global_step == 1
    folder = Path(cli.trainer.log_dir)
    assert {"predictions.csv", "thresholds.csv", "checkpoints"} <= {path.name for path in folder.iterdir()}
    labeler = {"zero_shot": LabeledOnly, "linear_probe": LinearProbe, "stacked_probes": StackedProbes}[method]
    assert isinstance(cli.model.labeler, labeler)
    assert 0 <= cli.trainer.callback_metrics["val/mAP"] <= 1


@pytest.mark.usefixtures("one_picture")
def test_stacked_probes_on_photos(
    roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """methods/stacked_probes.yaml after photos.yaml reports metrics and labels images, as in docs/how_to/photos.md."""
    monkeypatch.chdir(tmp_path)
    overlays = files("photos", "methods/stacked_probes")
    source = f"--data.source.init_args.train={roots['table'] / 'train.csv'}"
    tiny = [f"--model.init_args.network.init_args.clip={clip_folder}", "--data.image_size=64", "--data.num_workers=0"]
    rest = [f"--trainer.default_root_dir={tmp_path}", "--report.num_images=1"]
    cli = main(["fit", *overlays, source, *tiny, *rest])
    assert cli.trainer.global_step == 1
    assert 0 <= cli.trainer.callback_metrics["val/mAP"] <= 1
    assert (Path(cli.trainer.log_dir) / "labels.csv").is_file()


@pytest.mark.usefixtures("one_picture")
def test_thresholds_by_an_objective(
    roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = f"--data.source.init_args.train={roots['table'] / 'train.csv'}"
    order = files("methods/cbsa", "data/table", "methods/cbsa_safe")
    chosen = ["--model.objective=cbsa_lightning.method.decisions.Recall", "--model.objective.init_args.target=0.8"]
    cli = fit(order, tmp_path, clip_folder, source, *chosen, "--report.num_images=1")
    with (Path(cli.trainer.log_dir) / "thresholds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == cli.model.class_names
    thresholds = [float(row["threshold"]) for row in rows]
    np.testing.assert_allclose(thresholds, cli.model.decision_thresholds().numpy(), rtol=1e-6)
    for row in rows:
        assert float(row["expected_recall_low"]) <= float(row["expected_recall"]) <= float(row["expected_recall_high"])
        assert float(row["expected_recall"]) >= 0.8
        assert 0 <= float(row["validation_precision"]) <= 1


def test_the_safe_preset_on_own_images(
    roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set has a class list and no test table."""
    monkeypatch.chdir(tmp_path)
    source = f"--data.source.init_args.train={roots['table'] / 'train.csv'}"
    order = ["methods/cbsa", "data/table", "methods/cbsa_safe"]
    cli = fit(files(*order), tmp_path, clip_folder, source, "--report.enabled=false")
    assert isinstance(cli.model.labeler, StackedProbes)
    assert (cli.datamodule.batch_size, cli.datamodule.labeled_per_batch) == (76, 16)
    assert cli.model.ema.decay == 0.98
    table, split = cli.model.pseudo_labels, cli.datamodule.split
    assert len(split.unlabeled) == 12
    assert ((table[split.unlabeled] > 0) & (table[split.unlabeled] < 1)).all()
    assert cli.trainer.callback_metrics["train/loss_unsup"] > 0
    assert "train/loss_aux" in cli.trainer.callback_metrics


def test_gain_check_before_a_fit(
    roots: dict[str, Path],
    clip_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The check writes a sentence, a table, a plot and log entries, and optionally disables the unlabeled images."""
    monkeypatch.chdir(tmp_path)
    root = f"--data.source.init_args.root={roots['voc']}"
    order = ["methods/cbsa", "data/voc", "methods/cbsa_safe"]
    monkeypatch.setattr(Gain, "hurts", False)
    check = [
        "--gain.folds=2",
        "--gain.keep_labeled_only=true",
        "--data.labeled_fraction=0.9",
        "--report.enabled=false",
    ]
    cli = fit(files(*order), tmp_path, clip_folder, root, *check)
    assert isinstance(cli.model.labeler, StackedProbes)
    out = capsys.readouterr().out
    assert "90% bootstrap interval:" in out
    assert "did not use them" not in out
    folder = Path(cli.trainer.log_dir)
    rows = (folder / "gain.csv").read_text().splitlines()
    assert len(rows) == 22
    assert (folder / "gain.png").is_file()
    assert "gain/estimate" in (folder / "metrics.csv").read_text()

    gain = cli._gain  # measured once
    monkeypatch.setattr(GainCheck, "__call__", lambda *_: gain)
    monkeypatch.setattr(Gain, "hurts", True)
    cli = fit(files(*order), tmp_path, clip_folder, root, *check, "--compare=true")
    assert isinstance(cli.model.labeler, LabeledOnly)
    assert "did not use them" in capsys.readouterr().out
    assert not (Path(cli.trainer.log_dir) / "comparison.csv").exists()
    saved = yaml.safe_load((Path(cli.trainer.log_dir) / "config.yaml").read_text())
    assert saved["model"]["init_args"]["labeler"]["class_path"].endswith("LabeledOnly")
    assert saved["gain"] is None


@pytest.mark.usefixtures("one_picture")
def test_wandb_overlay_offline(
    roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = f"--data.source.init_args.root={roots['voc']}"
    overlays = files("methods/cbsa", "data/voc", "shares/p20", "loggers/wandb")
    cli = fit(overlays, tmp_path, clip_folder, root, "--report.num_images=1")
    run = cli.trainer.loggers[1].experiment
    assert run.config["data"]["labeled_fraction"] == 0.2
    assert run.config["model"]["init_args"]["num_contexts"] == 2
    assert run.summary["val/mAP"]["last"] == pytest.approx(float(cli.trainer.callback_metrics["val/mAP"]))
    import wandb

    wandb.finish()
    assert list((tmp_path / "runs" / "wandb").rglob("*.png"))


def test_gpu_overlay_names_mixed_precision() -> None:
    files = [CONFIGS / f"{name}.yaml" for name in ("methods/cbsa", "data/voc", "hardware/gpu")]
    trainer = parse(files)["trainer"]
    assert (trainer["accelerator"], trainer["devices"], trainer["precision"]) == ("gpu", 1, "16-mixed")


def test_cpu_overlay_keeps_features(
    roots: dict[str, Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = f"--data.source.init_args.root={roots['voc']}"
    overlays = files("methods/cbsa", "data/voc", "shares/p20", "hardware/cpu")
    cli = fit(overlays, tmp_path, clip_folder, root, "--report.num_images=1")
    assert next(iter(cli.datamodule.train_dataloader())).images is None
    assert list((tmp_path / "cache").glob("features-*/rows.bin"))
    assert (Path(cli.trainer.log_dir) / "pictures" / "predictions.png").is_file()


@pytest.mark.parametrize(("images", "unlabeled", "classes"), [(20, 8, 2), (40, 30, 300)])
def test_photos_of_the_user(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch, images: int, unlabeled: int, classes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"thing {i}" for i in range(classes)]
    make_table(tmp_path, n_train=images, unlabeled=unlabeled, class_names=names)
    flags = [flag for flag in run_flags(tmp_path) if "limit_train" not in flag]
    words = [*files("photos"), "--data.source.init_args.train=train.csv", *network_flags(clip_folder), *flags]
    steps = ["--trainer.check_val_every_n_epoch=1", "--data.min_steps_per_epoch=3"]
    cli = main(["fit", *words, *steps, "--report.num_images=2"])
    assert cli.trainer.global_step == 6
    assert cli.model.fusion.ready
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert 0 <= found["val/ECE"] <= 1
    assert {"val/mAP", "val/mAP_network"} <= found.keys()


def below(overlay: Path) -> list[Path]:
    """Returns the configurations that an overlay extends."""
    folder, *deeper = overlay.relative_to(CONFIGS).parts[:-1] or [""]
    cbsa, voc = CONFIGS / "methods" / "cbsa.yaml", CONFIGS / "data" / "voc.yaml"
    if not folder:  # a complete configuration
        return []
    if folder == "data":
        return [cbsa]
    if deeper:  # settings of a method for one data set
        return [CONFIGS / "methods" / overlay.name, CONFIGS / "data" / f"{deeper[0]}.yaml"]
    return [voc] if "class_path" in yaml.safe_load(overlay.read_text()).get("model", {}) else [cbsa, voc]


@pytest.mark.parametrize(
    "overlay",
    sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "class_files" and file.stem != "sweep"),
    ids=lambda file: file.relative_to(CONFIGS).as_posix(),
)
def test_every_overlay_parses(overlay: Path) -> None:
    settings = parse([*below(overlay), overlay])
    assert settings["model"]["class_path"].startswith("cbsa_lightning.")
    assert settings["data"]["source"]["class_path"].startswith("cbsa_lightning.")


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_name_classes_without_their_module(file: Path) -> None:
    assert "cbsa_lightning." not in file.read_text(encoding="utf-8")


def test_classes_are_found_by_name_and_by_path() -> None:
    assert class_named("StackedProbes") is StackedProbes
    assert class_named("torch.nn.Linear") is torch.nn.Linear
    for name in ("StackedProbe", "torch.nn.Liner", "os.path"):
        with pytest.raises(ConfigError, match=f"no class {name}"):
            class_named(name)


def test_a_comparison_without_a_validation_is_refused_before_training(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(CONFIGS / "quickstart.yaml"), "--data.source.init_args.num_train=20"]
    words += ["--data.source.init_args.num_test=4", "--trainer.limit_val_batches=0", "--data.labeled_fraction=0.3"]
    with pytest.raises(ConfigError, match="--compare requires validation"):
        main(["fit", *words])
