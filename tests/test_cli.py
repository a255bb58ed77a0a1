"""Errors of the command line and their messages."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cbsa_lightning import SSMLLModule
from cbsa_lightning import __main__ as cli
from cbsa_lightning.cli.lightning_cli import make_cli
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.losses import AsymmetricLoss
from cbsa_lightning.networks.dualcoop import DualCoOp
from layouts import make_table, write_rows

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def arguments(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    make_table(tmp_path, n_train=12, unlabeled=6)
    return [
        "fit",
        f"--config={CONFIGS / 'methods' / 'cbsa.yaml'}",
        f"--config={CONFIGS / 'data' / 'table.yaml'}",
        f"--model.init_args.clip={clip_folder}",
        "--data.image_size=64",
        "--data.num_workers=0",
        f"--data.source.init_args.train={tmp_path / 'train.csv'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        "--report.enabled=false",
    ]


def test_more_contexts_than_classes(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="7 contexts cannot be formed from 3 classes"):
        cli.main([*arguments, "--model.init_args.num_contexts=7"])


def test_labeled_fraction_is_refused_for_a_table_with_unlabeled_images(arguments: list[str]) -> None:
    with pytest.raises(DataError, match=r"6 of 12 training images have none. Omit it"):
        cli.main([*arguments, "--data.labeled_fraction=0.5"])


def test_a_fraction_without_labeled_images_is_refused(arguments: list[str], tmp_path: Path) -> None:
    make_table(tmp_path, n_train=12, unlabeled=0)
    with pytest.raises(ConfigError, match=r"0\.01"):
        cli.main([*arguments, "--data.labeled_fraction=0.01"])


def test_the_error_for_missing_weights_lists_ways_to_get_them(arguments: list[str]) -> None:
    from cbsa_lightning.errors import WeightsError

    with pytest.raises(WeightsError, match="Ways to obtain weights"):
        cli.main([*arguments, "--model.init_args.clip=RN50-quickgelu"])


def test_the_error_for_an_unknown_class_names_its_row(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text("cat: cat\ndog: dog\nzebra: zebra\n")
    write_rows(tmp_path / "bad.csv", ["image", "labels"], [["images/train_0.png", "cta"]])
    bad = [*arguments, "--data.source.init_args.train=bad.csv", "--data.source.init_args.class_file=classes.yaml"]
    with pytest.raises(DataError, match=r"row 2.*cta.*cat"):
        cli.main(bad)


def test_errors_end_the_command_with_one_sentence(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cbsa", *arguments, "--model.init_args.num_contexts=7"])
    with pytest.raises(SystemExit) as stop:
        cli.entry_point()
    assert str(stop.value).startswith("ConfigError: 7 contexts cannot be formed from 3 classes")


@pytest.mark.parametrize("callback", ["LearningRateMonitor", "DeviceStatsMonitor"])
def test_errors_of_lightning_end_the_command_with_one_sentence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, callback: str
) -> None:
    words = [*arguments, f"--trainer.callbacks+={callback}", "--trainer.logger=false"]
    monkeypatch.setattr("sys.argv", ["cbsa", *words])
    with pytest.raises(SystemExit, match=f"MisconfigurationException: Cannot use `{callback}` callback"):
        cli.entry_point()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.source: " + "x" * 9999, "data.source"),
        ("model: {" + "x" * 999 + ": 1}", "model"),
        ("model.optimizer: " + "a b " * 9999, "model.optimizer"),
        ("model: {class_path: torch.Tensor, init_args: {lr: 1}}", "Option 'lr'|no setting|--model"),
        ('trainer: "a\\0b"', "line 1 has a NUL character"),
    ],
    ids=lambda text: text[:20],
)
def test_errors_for_malformed_settings_are_short(
    arguments: list[str], tmp_path: Path, setting: str, message: str
) -> None:
    (tmp_path / "odd.yaml").write_text(setting)
    with pytest.raises(ConfigError, match=message) as refusal:
        cli.main([*arguments, "--config=odd.yaml"])
    assert len(str(refusal.value)) < 5100


def test_the_error_for_too_little_memory_names_settings_to_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")

    monkeypatch.setattr(cli, "main", fails)
    with pytest.raises(SystemExit, match=r"Tried to allocate 20\.00 GiB\. Reduce data\.batch_size"):
        cli.entry_point()


def test_unknown_option_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="no setting 'num_context'"):
        cli.main([*arguments, "--model.init_args.num_context=2"])


def test_a_loss_object_can_be_combined_with_another_network(arguments: list[str], clip_folder: Path) -> None:
    """The loss can be configured, for example ASL with the ``gamma_neg`` of CAP or DualCoOp."""
    own = [
        part.replace("methods/cbsa", "methods/dualcoop").replace("init_args.clip", "init_args.network.init_args.clip")
        for part in arguments[1:]
    ]
    loss = [
        "--model.init_args.loss=cbsa_lightning.method.losses.AsymmetricLoss",
        "--model.init_args.loss.init_args.gamma_neg=2",
    ]
    built = make_cli([*own, *loss], run=False)
    assert isinstance(built.model.loss, AsymmetricLoss)
    assert built.model.loss.gamma_neg == 2
    assert built.model.network.prompt_names == ["cat", "dog", "zebra"]


def test_prompt_names_are_the_same_in_python_and_on_the_command_line(clip_folder: Path) -> None:
    module = SSMLLModule(["fire_hydrant", "dog"], partial(DualCoOp, clip=str(clip_folder), prompt_length=2))
    assert module.prompt_names == ["fire hydrant", "dog"]


@pytest.mark.parametrize("flag", ["--model.optimizer.lr=0.01", "--model.init_args.optimizer.init_args.lr=0.01"])
def test_the_learning_rate_can_be_set_alone(arguments: list[str], flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    monkeypatch.setattr(SSMLLModule, "on_train_start", lambda self: rates.append(self.make_optimizer([torch.zeros(1)])))
    cli.main([*arguments, "--model.init_args.num_contexts=0", "--trainer.max_steps=1", flag])
    assert rates[0].defaults["lr"] == 0.01
    assert rates[0].defaults["weight_decay"] == 1e-4


def test_torch_schedulers_can_be_configured(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(self: SSMLLModule) -> None:
        seen.append((self.lr_schedulers(), self.scheduled_steps))

    monkeypatch.setattr(SSMLLModule, "on_train_start", look)
    flags = ["--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.eta_min=1e-6"]
    cli.main([*arguments, "--model.init_args.num_contexts=0", "--trainer.max_steps=1", *flags])
    schedule, steps = seen[0]
    assert (schedule.T_max, schedule.eta_min) == (steps, 1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.max_epoch=3"], r"^--trainer\.max_epoch is not an option\. Similar names: --trainer\.max_epochs"),
        (["--nonsense"], r"^--nonsense is not an option\.$"),
        (["--model.warmup=3"], r"^--model has no setting 'warmup'\. Similar names: warmup_epochs\.$"),
        (["--model.promt_length=3"], r"^--model has no setting 'promt_length'\. Similar names: prompt_length\.$"),
        (["--model.prompt_length=x"], r"^--model\.prompt_length is x; it must be int\.$"),
        (["--trainer.precision=17"], r"^--trainer\.precision is 17; it must be 64, 32, 16 or "),
        (["--model=Nope"], r"^--model: there is no suitable class 'Nope'"),
        (["--model.labeler=Nope"], r"^--model\.labeler: there is no suitable class 'Nope'"),
        (["--trainer.accelerator=gpu"], "No supported gpu backend"),
        (["--trainer.strategy=foo"], "invalid strategy name"),
        (
            ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.log_model=true"],
            "offline",
        ),
    ],
)
def test_error_messages_are_single_sentences(arguments: list[str], flags: list[str], message: str) -> None:
    if "gpu" in flags[0] and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ConfigError, match=message) as refusal:
        cli.main([*arguments, *flags])
    assert "\n" not in str(refusal.value)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize("words", ["--help", "--version", ""])
def test_help_needs_neither_torch_nor_lightning(words: str, tmp_path: Path) -> None:
    run = f"import sys; from cbsa_lightning.__main__ import main; main({words.split()!r}); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True).stdout
    assert ("cbsa 0." in said) if words == "--version" else ("table" in said and "--resume" in said)
    assert not {"torch", "lightning", "jsonargparse"} & set(said.split())


def test_the_classifier_needs_neither_open_clip_nor_albumentations_to_import() -> None:
    run = "import sys; from cbsa_lightning import Classifier; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True).stdout
    assert not {"open_clip", "albumentations", "lightning", "torchvision", "sklearn"} & set(said.split())
