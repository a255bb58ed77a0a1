"""Fixtures that every test may use; network access is off for the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# One thread a process: the suite's models are tiny, and more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Containers often forbid Python to write bytecode. Then each process that a test starts would compile torch and
# Lightning again, for ten seconds. The bytecode goes into pytest's cache instead of beside the modules.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


@pytest.fixture(scope="session")
def realbench() -> Path:
    """Folder of real images for tests, outside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "realbench"
    if not folder.is_dir():
        pytest.skip("real test images are not on this machine (../shared/realbench)")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random CLIP with a ResNet tower."""
    from tiny_clip import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("clip"), "resnet")


@pytest.fixture(scope="session")
def squares_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that tests with ``tiny_data.Squares`` share, so that its images are written once."""
    return tmp_path_factory.mktemp("squares")
