"""Every run has its own folder with any loggers, and existing files are never lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger

from cbsa_lightning.__main__ import main
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.errors import CheckpointError, ConfigError
from cbsa_lightning.io.runs import folder_of, lock, next_version
from cbsa_lightning.training.loggers import RunLogger
from layouts import make_table

WANDB = "lightning.pytorch.loggers.WandbLogger"


class Silent(Logger):
    """A custom logger with the same name and version for each run, and no folder."""

    name = version = "mine"

    def log_metrics(self, *args, **kwargs):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


class Look(L.Callback):
    """Tries to lock the run's folder while it is trained."""

    seen: ClassVar[list[object]] = []

    def on_train_epoch_end(self, *_):
        self.seen.append(lock(Path("runs/cbsa/version_0")))


@pytest.fixture
def words(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch, one_picture: None) -> Iterator[list[str]]:
    """Returns arguments of a run of two epochs in a separate working folder."""
    make_table(tmp_path / "data", n_train=12, unlabeled=6)
    table = {"train": str(tmp_path / "data" / "train.csv")}
    model = {"clip": str(clip_folder), "num_contexts": 0, "prompt_length": 2, "decoder_feedforward": 8}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    settings = {
        "model": {"class_path": "cbsa_lightning.CBSAModule", "init_args": {**model, "warmup_epochs": 1}},
        "data": {
            "source": {"class_path": "cbsa_lightning.data.readers.table.Table", "init_args": table},
            **{"image_size": 64, "batch_size": 8, "num_workers": 0},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", **quiet},
        "report": {"num_images": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    wandb.finish()  # from another test
    yield ["fit", f"--config={tmp_path / 'tiny.yaml'}"]
    wandb.finish()


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("logger", "place"),
    [
        ("false", "runs/cbsa"),
        ("true", "lightning_logs"),
        ("test_runs.Silent", "runs/mine"),
        (f"[{{class_path: {WANDB}, init_args: {{project: mine, save_dir: out}}}}]", "out/mine"),
        (
            f"[{{class_path: {WANDB}, init_args: {{project: mine, save_dir: out}}}}, "
            "{class_path: cbsa_lightning.training.loggers.RunLogger, init_args: {save_dir: out, name: own}}]",
            "out/own",
        ),
    ],
    ids=["none", "Lightning's", "of one's own", "W&B alone", "W&B first"],
)
def test_each_run_has_its_own_folder(words, logger, place):
    own = {Path(name): b"my own" for name in ("config.yaml", "predictions.csv", "split.json", "wandb_id.txt")}
    for file, text in own.items():
        file.write_bytes(text)
    whole = {"config.yaml", "split.json", "run_id.txt", "predictions.csv", "pictures", "checkpoints"}
    folders, before = [], {}
    for number in range(2):
        folder = folder_of(main([*words, f"--trainer.logger={logger}", "--trainer.max_epochs=1"]).trainer)
        assert folder.resolve() == Path(place, f"version_{number}").resolve()
        assert whole <= {file.name for file in folder.iterdir()}
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        assert before.items() <= content(Path()).items()  # existing files are unchanged
        folders.append(folder)
        before = {file: text for file, text in content(Path(place)).items() if folder in file.parents} | own
    assert len({(folder / "run_id.txt").read_text() for folder in folders}) == 2
    if "Wandb" in logger:  # each training has its own W&B run, although both are in one process
        assert len({(folder / "wandb_id.txt").read_text() for folder in folders}) == 2
    assert {file: file.read_bytes() for file in own} == own


def test_a_wandb_run_of_the_user_is_used_unchanged(words, tmp_path):
    run = wandb.init(project="sweep", dir=tmp_path, mode="offline")
    logger = f"--trainer.logger={{class_path: {WANDB}, init_args: {{project: mine, save_dir: out}}}}"
    for _ in range(2):
        main([*words, logger, "--report.enabled=false", "--trainer.max_epochs=1"])
        assert wandb.run is run
    run.finish()


def test_an_existing_version_is_refused(words):
    named = (
        "--trainer.logger={class_path: cbsa_lightning.training.loggers.RunLogger, init_args: {save_dir: a, version: b}}"
    )
    words = [*words, "--trainer.max_epochs=1", "--report.enabled=false", named]
    folder = folder_of(main(words).trainer)
    before = content(Path())
    with pytest.raises(ConfigError, match=rf"{folder} contains config.yaml, .*--resume {folder}"):
        main(words)
    assert content(Path()) == before


def test_evaluations_have_their_own_folders_and_are_not_resumed(words, tmp_path):
    folder = folder_of(main(words).trainer)
    before, last = content(folder), folder / "checkpoints" / "last.ckpt"
    for verb in ("validate", "predict"):
        evaluated = [verb, f"--config={folder}/config.yaml", f"--ckpt_path={last}", f"--data.predict={tmp_path}/data"]
        there = folder_of(main(evaluated).trainer)
        assert there != folder
        assert (there / "config.yaml").is_file()
    assert content(folder) == before
    assert folder_of(main(["fit", "--resume"]).trainer) == Path("runs/cbsa/version_0")
    own = tmp_path / "own.csv"
    own.write_text("my own")
    with pytest.raises(ConfigError, match=r"own\.csv exists already"):
        main([*evaluated, f"--predictions.output={own}"])
    assert own.read_text() == "my own"


def test_a_refused_resume_changes_nothing(words, tmp_path):
    folder = folder_of(main([*words, "--report.enabled=false"]).trainer)
    make_table(tmp_path / "other", n_train=14, unlabeled=6)
    before = content(folder)
    other = f"--data.source.init_args.train={tmp_path}/other/train.csv"
    for change, error in ((other, CheckpointError), ("--trainer.max_epochs=5", CheckpointError)):
        with pytest.raises(error):
            main(["fit", f"--resume={folder}", change])
        assert content(folder) == before, change
    main(["fit", f"--resume={folder}"])


def test_a_run_in_training_is_locked(words):
    Look.seen.clear()
    look = "--trainer.callbacks=[{class_path: test_runs.Look}]"
    main([*words, look, "--trainer.max_epochs=1", "--report.enabled=false"])
    assert Look.seen == [None]
    after = lock(Path("runs/cbsa/version_0"))
    assert after is not None
    after.close()


def test_a_run_without_a_logger_resumes_in_its_folder(words):
    words += ["--trainer.logger=false", "--report.enabled=false"]
    folder = folder_of(main([*words, "--trainer.max_steps=1"]).trainer)
    again = main(["fit", "--resume", "--trainer.max_steps=-1"]).trainer
    assert folder_of(again).resolve() == folder.resolve()
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["epoch"] == 1
    assert sorted(Path("runs/cbsa").iterdir()) == [Path("runs/cbsa/version_0")]


@pytest.mark.parametrize(
    "settings",
    [
        ["--trainer.fast_dev_run=true"],
        ["--trainer.fast_dev_run=true", "--compare=true"],
        ["--trainer.fast_dev_run=true", "--checkpoint.dirpath=ck", "--trainer.logger=false"],
    ],
    ids=str,
)
def test_fast_dev_run_writes_nothing(words, settings):
    main([*words, *settings])
    assert content(Path()) == {}


def test_no_checkpoints_and_barebones(words):
    folder = folder_of(main([*words, "--trainer.enable_checkpointing=false", "--report.enabled=false"]).trainer)
    assert not list(Path().rglob("*.ckpt"))
    with pytest.raises(ConfigError, match="metrics of finished epochs, but no checkpoint"):
        main(["fit", f"--resume={folder}"])
    main([*words, "--trainer.barebones=true"])
    assert not list(Path().rglob("*.ckpt"))
    with pytest.raises(ConfigError, match="--compare needs metrics"):
        main([*words, "--trainer.barebones=true", "--compare=true"])


def test_concurrent_runs_get_different_versions(tmp_path):
    (tmp_path / "version_3").mkdir()
    assert [next_version(tmp_path).name for _ in range(2)] == ["version_4", "version_5"]
    loggers = [RunLogger(tmp_path, ""), RunLogger(tmp_path, "")]
    assert [logger.version for logger in loggers] == [6, 7]
    assert CSVLogger(tmp_path, "").version == 8
