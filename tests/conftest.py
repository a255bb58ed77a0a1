"""Fixtures for all tests; the whole suite runs without network access."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One thread per process: the models are tiny, and more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def realbench() -> Path:
    """Returns the folder of real images, outside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "realbench"
    if not folder.is_dir():
        pytest.skip("real test images are not on this machine (../shared/realbench)")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny random CLIP with a ResNet tower."""
    from tiny_clip import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("clip"), "resnet")


@pytest.fixture(scope="session")
def squares_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder shared by tests with ``tiny_data.Squares``, so that its images are written once."""
    return tmp_path_factory.mktemp("squares")
