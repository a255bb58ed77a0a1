"""Fixtures for all tests; the whole suite runs without network access."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# One thread per process: the models are tiny, and more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Containers often disable bytecode files. Each process that a test starts would then compile torch and Lightning again,
# which takes ten seconds. Write the bytecode to pytest's cache instead.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


# Files that take long start first, so that no process waits for the other at the end.
LONG = (
    *("test_tables.py", "test_systems.py", "test_exported_systems.py", "test_command_line.py", "test_two_processes.py"),
    *("test_runs.py", "test_resume.py", "test_configs.py", "test_cells.py", "test_warm_start.py"),
    *("test_partial_systems.py", "test_quickstart.py", "test_notebooks.py", "test_label_features.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of long files to the front; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


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


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the pictures of a report, which take longer than a tiny fit, with an empty one.

    For tests of something else; ``callbacks/test_report.py``, ``test_quickstart.py`` and others draw them all.
    """
    from matplotlib.figure import Figure

    from cbsa_lightning.callbacks.report import RunReport

    monkeypatch.setattr(RunReport, "_pictures", lambda *_: iter([("training", Figure())]))


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that ask for float32 get float64."""
    import torch

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
