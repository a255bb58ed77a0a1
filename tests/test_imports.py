"""Who may import whom: a module imports from its own floor or from below, never from above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cbsa_lightning

ROOT = Path(cbsa_lightning.__file__).parent
FLOORS = (
    {"errors", "arguments", "embedded", "files", "finite", "compiled", "optimizers"},
    {
        "data",
        "losses",
        "thresholds",
        "labelers",
        "stacking",
        "linear_probe",
        "calibration",
        "decisions",
        "contexts",
        "metrics",
        "specificity",
        "clip",
        "paper",
        "overlays",
    },
    {"networks"},
    {
        "ema",
        "fusion",
        "descriptions",
        "schedules",
        "stage_length",
        "context_task",
        "check_command",
        "check_report",
        "checking",
        "changes",
        "checkpoint_files",
        "checkpoint_flags",
        "checkpoint_io",
        "config_files",
        "earlier_run",
        "cli_parser",
        "loggers",
        "findings",
        "near_duplicates",
        "resuming",
        "run_time",
        "runs",
        "checkpoints",
        "labels",
        "predictions",
        "pictures",
        "reliability",
        "precision_recall",
        "report_page",
        "inference",
        "warm_start",
        "callbacks",
    },
    {"module"},
    {"cbsa", "comparison", "gain"},
    {"class_paths"},
    {"lightning_cli"},
    {"recipes"},
    {"cells", "cost"},
    {"unit_times"},
    {"results", "table_pictures", "table_page", "tables"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imported(tree):
    """Full names of all modules that a file imports, those for type checks only and those in functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # "from cbsa_lightning import x" may name a module or an attribute of the package
            names += (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "cbsa_lightning" else [node.module]
            )
    return names


def part(file):
    return file.split("/")[0].removesuffix(".py")


def test_every_file_has_a_floor():
    assert {part(file) for file in FILES} - {"__init__"} <= FLOOR.keys()


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_nobody_imports_from_above(file):
    own = FLOOR[part(file)]
    for name in imported(FILES[file]):
        if name.startswith("cbsa_lightning.") and name != "cbsa_lightning.__version__":
            other = name.split(".")[1]
            assert FLOOR[other] <= own, f"{file} imports {name}"


def reached(file, seen=None):
    """All files of the library that importing ``file`` runs, and all foreign packages on the way."""
    seen = {} if seen is None else seen
    if file in seen:
        return seen
    seen[file] = set()
    for node in FILES[file].body:  # top level only: what a function imports waits until it is called
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(ast.Module([node], [])):
                if not name.startswith("cbsa_lightning"):
                    seen[file].add(name.split(".")[0])
                    continue
                parts = name.split(".")[1:]
                for depth in range(1, len(parts) + 1):
                    stem = "/".join(parts[:depth])
                    for found in (f"{stem}.py", f"{stem}/__init__.py"):
                        if found in FILES:
                            reached(found, seen)
    return seen


@pytest.mark.parametrize(
    "start",
    [
        "check_command.py",
        "networks/cbsa.py",
        "inference.py",
        "clip/frozen.py",
        "losses.py",
        "labelers.py",
        "thresholds.py",
    ],
)
def test_pure_torch_never_reaches_lightning(start):
    for file, foreign in reached(start).items():
        assert not foreign & {"lightning", "pytorch_lightning", "lightning_fabric"}, f"{start} reaches it in {file}"


def test_albumentations_lives_in_one_place():
    users = {file for file, tree in FILES.items() if any(n.split(".")[0] == "albumentations" for n in imported(tree))}
    assert users <= {"data/views.py", "data/randaugment.py"}
    assert "data/views.py" in users
