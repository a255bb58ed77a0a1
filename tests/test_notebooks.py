"""The shipped notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

SIZES = "NUM_TRAIN, NUM_TEST, WARMUP, EPOCHS = 160, 48, 8, 10"
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as in a notebook
    notebook = nbformat.read(path, as_version=4)
    assert sum(SIZES in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:  # smaller sizes
        cell.source = cell.source.replace(SIZES, "NUM_TRAIN, NUM_TEST, WARMUP, EPOCHS = 80, 24, 1, 2")
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "val/mAP" in printed
    assert "[100, 300] positives of 1000" in printed
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 5
