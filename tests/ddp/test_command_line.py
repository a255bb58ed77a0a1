"""The command with two processes, started like a user would: it does not hang, and messages are printed once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layouts import make_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def fit(folder: Path, clip_folder: Path, launcher: list[str], *more: str) -> tuple[str, str, Path]:
    """Trains a small run; returns its output, its metrics and its folder."""
    make_table(folder, n_train=24, unlabeled=12)
    overlays = ["methods/cbsa", "data/table", "methods/cbsa_safe"]
    command = [
        *launcher,
        *("-m", "cbsa_lightning.__main__", "fit"),
        *(f"--config={CONFIGS / name}.yaml" for name in overlays),
        f"--data.source.init_args.train={folder / 'train.csv'}",
        f"--model.init_args.clip={clip_folder}",
        "--model.init_args.prompt_length=2",
        "--model.init_args.decoder_feedforward=16",
        "--model.init_args.warmup_epochs=1",
        "--data.image_size=64",
        "--data.num_workers=0",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.enable_progress_bar=false",
        "--report.num_images=1",
        *more,
    ]
    ran = subprocess.run(
        command, cwd=folder, env={**os.environ}, capture_output=True, text=True, timeout=400, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout, ran.stderr, next((folder / "runs").glob("*/version_0"))


def test_a_complete_run_with_gain_check_and_comparison(tmp_path: Path, clip_folder: Path) -> None:
    said, _, folder = fit(tmp_path, clip_folder, [sys.executable], "--gain.folds=2", "--compare=true")
    assert said.count("points of mAP in cross-validation") == 1
    for name in ("config.yaml", "split.json", "gain.csv", "gain.png", "comparison.csv", "checkpoints/last.ckpt"):
        assert (folder / name).is_file(), name


@pytest.mark.slow
def test_under_torchrun_as_documented(tmp_path: Path, clip_folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    _, logged, folder = fit(tmp_path, clip_folder, torchrun)
    assert logged.count("All distributed processes registered. Starting with 2 processes") == 1
    for name in ("config.yaml", "split.json", "predictions.csv", "checkpoints/last.ckpt"):
        assert (folder / name).is_file(), name
    assert len(list((tmp_path / "runs").glob("*/*"))) == 1, "each process has a folder of its own"
