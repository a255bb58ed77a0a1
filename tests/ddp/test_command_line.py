"""The command on two processes, as a user starts it: nothing hangs, and what is told is told once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from layouts import make_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_whole_run_with_gain_check_and_comparison(tmp_path: Path, clip_folder: Path) -> None:
    make_table(tmp_path, n_train=24, unlabelled=12)
    overlays = ["methods/cbsa", "data/table", "methods/cbsa_safe"]
    command = [
        *(sys.executable, "-m", "cbsa_lightning.cli", "fit"),
        *(f"--config={CONFIGS / name}.yaml" for name in overlays),
        f"--data.source.init_args.train={tmp_path / 'train.csv'}",
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
        "--gain.folds=2",
        "--compare=true",
    ]
    ran = subprocess.run(
        command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=400, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.count("points of mAP (90% interval") == 1
    folder = next((tmp_path / "runs").glob("*/version_0"))
    for name in ("config.yaml", "split.json", "gain.csv", "gain.png", "comparison.csv", "checkpoints/last.ckpt"):
        assert (folder / name).is_file(), name
