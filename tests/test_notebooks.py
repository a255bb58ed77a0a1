"""The notebooks run from top to bottom, and the outputs that they contain are complete and portable."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SIZES = re.compile(r"^((?:[A-Z_]+, )+[A-Z_]+) = (.+)$", re.MULTILINE)
"""The line of a notebook that sets the sizes of its data and the lengths of its runs."""
MACHINE = re.compile(r"(?<![\w.<])/(?:tmp|home|root|work|Users|usr|opt|var|mnt)/|[A-Z]:\\\\")


class Expected(NamedTuple):
    """How to test a notebook.

    Attributes:
        sizes: Right-hand side of its line of sizes for a short run.
        printed: Regular expressions of what it prints at any size.
        short: Regular expressions of what it prints in the short run.
    """

    sizes: str
    printed: tuple[str, ...]
    short: tuple[str, ...] = ()


PERCENT = r"\d+\.\d"
NOTEBOOKS = {
    "quickstart": Expected("80, 24, 1, 2", (r"'val/mAP': 0\.\d", r"\[100, 300\] positives of 1000")),
    "your_own_photos": Expected(
        "64, 40, 1, 6",  # photos.yaml validates every sixth epoch
        (
            r"missing \(1\)[^\n]*\n +photos/photo_00O\.png",
            "No faults found",
            rf"val/mAP is {PERCENT} % .* stacked probes {PERCENT} %",
            r"sure: \d+ decisions, \d+ % correct",
            r"\d+ of the first 20 listed labels are flipped",
            "On [0-9]+ validation images, not used for training",
        ),
        (r"train: 64 images, 40 labeled", "Labels of 24 images", "Labels of 6 images"),
    ),
    "reproducing_a_table": Expected(
        "100, 40, 1, 2, '1 2'",
        (
            r"\| Ours \| - \(82\.10\)",
            r"contains (\d+) of \1 cells",
            rf"\| Ours \| {PERCENT} ± {PERCENT} \|",
            rf"\| DualCoOp \| [+-]{PERCENT} ± {PERCENT} \|",
            rf"difference: [+-]{PERCENT} ± {PERCENT} points",
        ),
        ("first stage: 1 epochs = 15 steps",),
    ),
    "inside_the_method": Expected(
        "100, 32, 1, 2",
        (rf"test mAP: {PERCENT} %", r"\d+ % of the positive pseudo-labels are correct", r"context 2: \w+"),
        (r"z \(32, 10, 64\)", "of 80 unlabeled images have a context target"),
    ),
    "a_method_of_your_own": Expected(
        "160, 32, 1, 2, (1,)",
        (
            r"tensor\(\[\[ 1,  0\],\s+\[ 1, -1\],\s+\[ 0, -1\]\]",
            "OneLook 1 parameters",
            rf"own labeler +{PERCENT} +{PERCENT}",
            rf"all three +{PERCENT} +{PERCENT}",
        ),
    ),
    "partial_labels": Expected(
        "60, 32, 1, 2, (1,)",
        (
            "partly labeled",
            rf"unknown labels count as absent +mAP {PERCENT} %",
            rf"binary cross-entropy +mAP {PERCENT} %",
            r"'known_fraction': 0\.3\} -> \d+ present, \d+ absent, \d+ unknown",
        ),
        (r"train: 60 images, 30 labeled \(24 are partly labeled\), 30 unlabeled",),
    ),
}
LONG = {"reproducing_a_table", "your_own_photos"}  # run commands that other tests also run
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> str:
    """Returns everything that the code cells print or show as text."""
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    data = [out.get("data", {}) for out in outputs]
    return "\n".join(
        [out.get("text", "") for out in outputs]
        + [part[kind] for part in data for kind in ("text/plain", "text/markdown") if kind in part]
    )


def kinds(cell: NotebookNode) -> set[str]:
    """Returns the kinds of a cell's outputs: "text", "image/png" or the name of an error."""
    found = {kind for out in cell.outputs for kind in out.get("data", {"text": 0}) if kind != "text/html"}
    return {"text" if kind.startswith("text/") else kind for kind in found}


def execute(notebook: NotebookNode, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as in a notebook
    patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # for `!cbsa`
    patch.setenv("TMPDIR", str(folder))  # the notebooks work in temporary folders
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": folder}}
    ).execute()


@pytest.fixture(scope="module")
def short_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NotebookNode]:
    """Executes the selected notebooks with small sizes, in one kernel, since importing the library takes seconds."""
    selected = {item.callspec.params["name"] for item in request.session.items if "short_run" in item.name}
    notebooks = {name: read(name) for name in NOTEBOOKS if name in selected}
    for name, notebook in notebooks.items():
        (cell,) = (cell for cell in code_cells(notebook) if SIZES.search(cell.source))
        cell.source = SIZES.sub(rf"\1 = {NOTEBOOKS[name].sizes}", cell.source)
    forget = [new_code_cell("%reset -f") for _ in notebooks]
    joined = [
        cell for reset, notebook in zip(forget, notebooks.values(), strict=True) for cell in (*notebook.cells, reset)
    ]
    with pytest.MonkeyPatch.context() as patch:
        execute(new_notebook(cells=joined), tmp_path_factory.mktemp("notebooks"), patch)
    return notebooks


def errors(notebook: NotebookNode) -> list[str]:
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    return ["\n".join(out.traceback) for out in outputs if out.output_type == "error"]


def missing(notebook: NotebookNode, patterns: tuple[str, ...]) -> list[str]:
    """Returns the patterns that the notebook does not print."""
    return [pattern for pattern in patterns if not re.search(pattern, texts(notebook))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NOTEBOOKS]
)
def test_short_run(name: str, short_runs: dict[str, NotebookNode]) -> None:
    """A short run prints what is expected and shows outputs of the same kinds as the stored notebook."""
    notebook, expected = short_runs[name], NOTEBOOKS[name]
    assert errors(notebook) == []
    assert missing(notebook, expected.printed + expected.short) == []
    assert [kinds(cell) for cell in code_cells(notebook)] == [kinds(cell) for cell in code_cells(read(name))]


@pytest.mark.slow
@every_notebook
def test_full_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(name)
    execute(notebook, tmp_path, monkeypatch)
    assert errors(notebook) == []
    assert missing(notebook, NOTEBOOKS[name].printed) == []


@every_notebook
def test_stored_outputs(name: str) -> None:
    """The stored outputs are those of one complete run without errors and warnings, and name no files of a machine."""
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    assert "stderr" not in {out.get("name") for cell in cells for out in cell.outputs}
    assert missing(notebook, NOTEBOOKS[name].printed) == []
    assert not MACHINE.search(texts(notebook))
    assert "\x1b" not in texts(notebook)  # control sequences of a terminal
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 700_000
