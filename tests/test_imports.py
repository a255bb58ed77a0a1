"""Import directions: a module imports from its own folder and from the folders before it in the import order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cbsa_lightning

ROOT = Path(cbsa_lightning.__file__).parent
# In import order; ARCHITECTURE.md describes each folder.
ORDER = (
    "errors",
    "arguments",
    "lightning_private",
    "dropout",
    "attention",
    "io",
    "clip",
    "networks",
    "method",
    "data",
    "checkpoints",
    "inference",
    "reports",
    "callbacks",
    "training",
    "cli",
    "reproduce",
    "__main__",
)
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imported(tree):
    """Returns full names of all modules that a file imports, including those in functions and for type checks."""
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


def test_every_top_level_entry_has_a_place():
    assert {part(file) for file in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_point_downwards(file):
    own = ORDER.index(part(file))
    for name in imported(FILES[file]):
        if name.startswith("cbsa_lightning.") and name != "cbsa_lightning.__version__":
            assert ORDER.index(name.split(".")[1]) <= own, f"{file} imports {name}"


@pytest.mark.parametrize("folder", [entry for entry in ORDER if (ROOT / entry).is_dir()])
def test_every_folder_is_documented(folder):
    assert ast.get_docstring(FILES[f"{folder}/__init__.py"])
    assert f"`{folder}/`" in (ROOT.parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")


def reached(file, seen=None):
    """Returns all files of the library that importing ``file`` runs, and all other packages."""
    seen = {} if seen is None else seen
    if file in seen:
        return seen
    seen[file] = set()
    for node in FILES[file].body:  # only the top level: imports in functions run when they are called
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
        "cli/check.py",
        "networks/cbsa.py",
        "inference/classifier.py",
        "clip/frozen.py",
        "method/losses.py",
        "method/labelers.py",
        "method/thresholds.py",
    ],
)
def test_pure_torch_never_reaches_lightning(start):
    for file, foreign in reached(start).items():
        assert not foreign & {"lightning", "pytorch_lightning", "lightning_fabric"}, f"{start} reaches it in {file}"


def test_albumentations_is_imported_in_one_module():
    users = {file for file, tree in FILES.items() if any(n.split(".")[0] == "albumentations" for n in imported(tree))}
    assert users <= {"data/augmentations.py", "data/randaugment.py"}
    assert "data/augmentations.py" in users


def foreign_private_attributes(file):
    """Private attributes of other objects that a file reads or writes."""
    for node in ast.walk(FILES[file]):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if node.attr in ("_replace", "_asdict"):  # public in a named tuple
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if not own and not (isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"):
            yield ast.unparse(node)


@pytest.mark.parametrize("file", [file for file in FILES if file != "lightning_private.py"])
def test_no_file_uses_private_attributes_of_others(file):
    nodes = list(ast.walk(FILES[file]))
    defined = {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_set_on_self(node)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    found = [name for name in foreign_private_attributes(file) if name.rpartition(".")[2] not in defined]
    # torch has no public form of its fused operations over lists of tensors.
    assert [name for name in found if not name.startswith("torch._foreach_")] == []


def is_set_on_self(node):
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
