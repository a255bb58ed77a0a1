"""scripts/on_gpu.sh runs all of its parts, here with tiny sizes and usually without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def on_gpu(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "on_gpu.sh"), "--tiny", *arguments]
    return subprocess.run(command, env=os.environ | {"OUT": str(out)}, capture_output=True, text=True)


@pytest.mark.slow
def test_all_parts_run_with_tiny_sizes(tmp_path):
    done = on_gpu(tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"\| (\w+) \| passed \|", summary) == ["tests", "step", "epoch", "table"]
    assert len(re.findall(r"\| VOC:tiny:4 \| bf16-mixed \|.*\| 5 \|", (tmp_path / "step.md").read_text())) == 2
    assert re.findall(r"\| (no caches|caches) \| (\d)", (tmp_path / "epoch.md").read_text()) == [
        ("no caches", "1"),
        ("caches", "1"),
        ("caches", "2"),
    ]
    assert re.findall(r"\| (DualCoOp|Ours) \| [\d.]+ \| [\d.]+ \|", (tmp_path / "table_9.md").read_text())
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.slow
def test_a_part_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    done = on_gpu(tmp_path, "--parts", "tests")
    assert done.returncode == 1
    assert "| tests | failed with exit status 4 |" in (tmp_path / "summary.md").read_text()
