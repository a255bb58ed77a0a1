"""Settings from checkpoints and flags: no flag is ignored, and no command uses untrained weights by mistake."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback

from cbsa_lightning import __main__ as cli
from cbsa_lightning.checkpoints.files import MODEL, read_checkpoint
from cbsa_lightning.cli.checkpoint_flags import mentioned, settle
from cbsa_lightning.errors import CheckpointError, ConfigError, DataError
from layouts import make_table
from tiny_data import Squares, tiny_fit

STORED = {
    "class_path": "cbsa_lightning.CBSAModule",
    "init_args": {
        "clip": "old",
        "prompt_length": 2,
        "unsup_weight": 1.0,
        "labeler": None,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.999]}},
    },
}


def with_values(**values):
    return {**STORED, "init_args": {**STORED["init_args"], **values}}


def with_optimizer(kind="torch.optim.AdamW", **values):
    settings = STORED["init_args"]["optimizer"]["init_args"]
    return with_values(optimizer={"class_path": kind, "init_args": {**settings, **values}})


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--model.unsup_weight=1"], {"unsup_weight"}),
        (["--model.init_args.optimizer.init_args.lr", "0.1"], {"optimizer.lr"}),
        (["--model", "CBSAModule", "--model.optimizer=SGD"], {"class_path", "optimizer"}),
        (["--model", "MODEL"], {"class_path", "clip", "optimizer.class_path", "optimizer.lr"}),
        (["--model={class_path: CBSAModule, init_args: {clip: x}}"], {"class_path", "clip"}),
        (["--config", "FILE"], {"class_path", "clip", "optimizer.class_path", "optimizer.lr"}),
        (["-c=FILE"], {"class_path", "clip", "optimizer.class_path", "optimizer.lr"}),
        (["--trainer.max_epochs=1", "--data.batch_size=2"], set()),
    ],
)
@pytest.mark.parametrize("below", [None, "fit"])
def test_settings_in_a_command_line(tmp_path, words, names, below):
    model = {
        "class_path": "CBSAModule",
        "init_args": {"clip": "x", "optimizer": {"class_path": "SGD", "init_args": {"lr": 1}}},
    }
    section = {"model": model, "trainer": {"max_epochs": 2}}
    (tmp_path / "FILE").write_text(yaml.safe_dump({below: section} if below else section))
    (tmp_path / "MODEL").write_text(yaml.safe_dump(model))
    assert mentioned([re.sub("FILE|MODEL", rf"{tmp_path}/\g<0>", word) for word in words]) == names


@pytest.mark.parametrize(
    ("model", "given", "training", "expected"),
    [
        (with_values(clip="default", prompt_length=16), [], True, STORED),
        (with_values(clip="new"), ["clip"], True, with_values(clip="new")),
        (with_values(clip="new", prompt_length=16), ["clip"], False, with_values(clip="new")),
        (with_values(unsup_weight=0.5), ["unsup_weight"], True, with_values(unsup_weight=0.5)),
        (with_optimizer(lr=0.1), ["optimizer.lr"], True, with_optimizer(lr=0.1)),
        (with_values(prompt_length=2), ["prompt_length"], True, STORED),
        (with_optimizer("torch.optim.SGD"), ["optimizer"], False, STORED),
        (with_values(labeler={"class_path": "LabeledOnly"}), ["labeler"], False, STORED),
    ],
)
def test_settings_that_are_not_given_come_from_the_checkpoint(model, given, training, expected):
    assert settle(model, given, {MODEL: yaml.safe_dump(STORED)}, "a.ckpt", training) == expected


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (with_values(prompt_length=16), ["prompt_length"], r"prompt_length is 16, but a.ckpt was trained with 2"),
        (with_optimizer("torch.optim.SGD"), ["optimizer"], r"optimizer.class_path is 'torch.optim.SGD'"),
        (with_values(labeler={"class_path": "LabeledOnly"}), ["labeler"], "LabeledOnly"),
        ({**STORED, "class_path": "Other"}, ["class_path"], "'Other'"),
    ],
)
def test_errors_for_contradicting_settings_contain_both_values(model, given, message):
    with pytest.raises(ConfigError, match=message):
        settle(model, given, {MODEL: yaml.safe_dump(STORED)}, "a.ckpt", training=True)


def test_checkpoints_from_python_use_their_hyperparameters():
    checkpoint = {"hyper_parameters": {"clip": "old", "prompt_length": 3, "class_names": ["a"]}}
    assert settle(with_values(clip="x"), [], checkpoint, "a.ckpt", False) == with_values(prompt_length=3)
    with pytest.raises(ConfigError, match=r"prompt_length is 2, but a\.ckpt was trained with 3"):
        settle(STORED, ["prompt_length"], checkpoint, "a.ckpt", False)


@pytest.mark.parametrize("text", ["[", "5", "a: [1"])
def test_a_damaged_configuration_is_refused(text):
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        settle(STORED, [], {MODEL: text}, "a.ckpt", True)


@pytest.fixture(scope="module")
def moved_run(tmp_path_factory, clip_folder):
    """Trains a run and moves its CLIP weights from ``before`` to ``after``; returns the folder of all of them."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(clip_folder, folder / "before")
    make_table(folder, n_train=12, unlabeled=6)
    (folder / "run.yaml").write_text(
        f"""
model:
  class_path: cbsa_lightning.CBSAModule
  init_args: {{clip: {folder}/before, num_contexts: 0, prompt_length: 2, decoder_heads: 4, warmup_epochs: 1}}
data:
  source: {{class_path: cbsa_lightning.data.readers.Table, init_args: {{train: {folder}/train.csv}}}}
  image_size: 64
  num_workers: 0
  batch_size: 4
trainer: {{accelerator: cpu, max_epochs: 2, enable_progress_bar: false, limit_val_batches: 0}}
report: {{enabled: false}}
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", f"--config={folder}/run.yaml", "--checkpoint.save_top_k=-1", "--trainer.max_epochs=2"])
    (folder / "before").rename(folder / "after")
    return folder


def test_untrained_weights_are_used_only_on_request(moved_run, monkeypatch):
    monkeypatch.chdir(moved_run)
    words = ["--config", str(moved_run / "run.yaml"), f"--model.clip={moved_run}/after"]
    for verb in ("predict", "validate", "test"):
        with pytest.raises(ConfigError, match=r"untrained"):
            cli.main([verb, *words])
    for place in ("last", "best"):
        for verb in ("fit", "validate"):
            with pytest.raises(ConfigError, match=f"ckpt_path {place}"):
                cli.main([verb, *words, f"--ckpt_path={place}"])
    cli.main(
        ["predict", *words, "--untrained=true", f"--data.predict={moved_run}/images", "--predictions.output=p.csv"]
    )
    assert (moved_run / "p.csv").exists()


def test_the_exit_status_is_3_if_images_were_skipped(moved_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(moved_run / "images", "images")
    broken = min(path for path in Path("images").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    words = ["predict", "--config", str(moved_run / "run.yaml"), f"--model.clip={moved_run}/after", "--untrained=true"]
    words += ["--data.predict=images", "--predictions.on_error=skip", "--predictions.output=p.csv"]
    with pytest.raises(SystemExit, match="3"):
        cli.main(words)
    assert broken.name in Path("p_left_out.csv").read_text()
    assert broken.name not in Path("p.csv").read_text()


@pytest.mark.parametrize("corrected", [False, True])
def test_moved_weights_are_found_by_flag_or_configuration(moved_run, tmp_path, monkeypatch, corrected):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(moved_run / "runs", tmp_path / "runs")
    run = tmp_path / "runs/cbsa/version_0"
    old = (run / "config.yaml").read_text()
    assert f"{moved_run}/before" in old
    flag = [f"--model.clip={moved_run}/after"]
    if corrected:
        (run / "config.yaml").write_text(old.replace(f"{moved_run}/before", f"{moved_run}/after"))
        flag = []
    first = run / "checkpoints" / "epoch=0.ckpt"
    predict = ["predict", f"--config={run}/config.yaml", f"--data.predict={moved_run}/images", f"--ckpt_path={first}"]
    cli.main([*predict, *flag, "--predictions.output=p.csv"])
    assert Path("p.csv").exists()
    for file in ("last.ckpt", "epoch=1.ckpt"):
        (run / "checkpoints" / file).unlink()
    cli.main(["fit", f"--resume={run}", *flag, "--model.optimizer.lr=0.01", "--model.unsup_weight=0.25"])
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert settings["clip"] == checkpoint["hyper_parameters"]["clip"] == f"{moved_run}/after"
    assert settings["unsup_weight"] == checkpoint["hyper_parameters"]["unsup_weight"] == 0.25
    assert settings["optimizer"]["init_args"]["lr"] == 0.01
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["max_lr"] in (0.01, 0.003)  # 0.003 for the pool
    with pytest.raises(ConfigError, match="prompt_length is 5"):
        cli.main([*predict, *flag, "--model.prompt_length=5"])


def adam(lr):
    return lambda groups: torch.optim.AdamW(groups, lr=lr)


def test_a_resumed_run_uses_the_new_optimizer_settings(tmp_path, clip_folder, squares_folder):
    settings = {"num_contexts": 0, "max_epochs": 4}
    squares = Squares(squares_folder)
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, optimizer=adam(1e-3), trainer={"max_steps": 5}, **settings)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    moments = [state["exp_avg"].clone() for state in trainer.optimizers[0].state.values()]
    resume = {"ckpt_path": str(tmp_path / "a.ckpt"), **settings}
    seen = {}

    def first_step(trainer, module, optimizer):
        if not seen:
            seen["lr"] = [group["lr"] for group in optimizer.param_groups]
            seen["moments"] = [state["exp_avg"].clone() for state in optimizer.state.values()]

    rates = []
    for lr in (1e-3, 5e-3):
        seen.clear()
        callbacks = [LambdaCallback(on_before_optimizer_step=first_step)]
        tiny_fit(tmp_path, clip_folder, squares, optimizer=adam(lr), trainer={"callbacks": callbacks}, **resume)
        rates.append(seen["lr"])
        assert all(map(torch.equal, seen["moments"], moments))
    assert rates[1] == pytest.approx([5 * rate for rate in rates[0]])
    with pytest.raises(CheckpointError, match="optimizer AdamW, but this run uses SGD"):
        tiny_fit(tmp_path, clip_folder, squares, optimizer=lambda g: torch.optim.SGD(g, lr=0.1), **resume)


def test_predict_uses_the_classes_of_the_checkpoint_without_a_training_table(moved_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = moved_run / "runs/cbsa/version_0"
    words = [
        f"--config={run}/config.yaml",
        f"--ckpt_path={run}/checkpoints/last.ckpt",
        f"--model.clip={moved_run}/after",
    ]
    images = f"--data.predict={moved_run}/images"
    cli.main(["predict", *words, images, "--predictions.output=with.csv"])
    gone = "--data.source.init_args.train=gone.csv"
    cli.main(["predict", *words, images, gone, "--predictions.output=without.csv"])
    assert Path("without.csv").read_text() == Path("with.csv").read_text()


def test_evaluation_uses_the_classes_of_the_checkpoint_without_a_training_table(moved_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = moved_run / "runs/cbsa/version_0"
    make_table(tmp_path, n_train=12, n_test=9)
    words = [
        f"--config={run}/config.yaml",
        f"--ckpt_path={run}/checkpoints/last.ckpt",
        f"--model.clip={moved_run}/after",
        f"--data.source.init_args.test={tmp_path}/test.csv",
    ]
    before = cli.main(["test", *words]).trainer.callback_metrics
    gone = "--data.source.init_args.train=gone.csv"
    with pytest.warns(
        UserWarning, match=r"gone.csv \(train\) does not exist: the classes are taken from the checkpoint"
    ):
        after = cli.main(["test", *words, gone]).trainer.callback_metrics
    assert "test/mAP" in before
    assert after == before
    with pytest.raises(DataError, match="neither test annotations nor training annotations"):
        cli.main(["test", *words, gone, "--data.source.init_args.test=null"])
