"""Documents refer only to existing files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.md")]
WRITTEN = {"my_systems.py", "serve.py", "recipe.yaml", "config.yaml"}  # written by examples and runs


@pytest.fixture(scope="module")
def files():
    return [
        f"/{path.relative_to(ROOT).as_posix()}"
        for path in ROOT.rglob("*")
        if not {".git", ".venv", "runs"} & set(path.parts)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.relative_to(ROOT).as_posix())
def test_named_files_exist(document, files):
    text = document.read_text(encoding="utf-8")
    if document.name == "CHANGELOG.md":
        pytest.skip("names files of earlier versions")
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml|sh)|docs/[\w/]+\.md)`", text)) - WRITTEN
    missing = [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in files)]
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not (document.parent / link).exists()]
    assert (missing, links) == ([], [])


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda notebook: notebook.stem)
def test_notebooks_refer_to_existing_pages(notebook):
    pages = re.findall(r"docs/[\w/]+\.md", notebook.read_text(encoding="utf-8"))
    assert [page for page in pages if not (ROOT / page).is_file()] == []


def test_the_architecture_names_every_module():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "src").rglob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if f"{name}`" not in text] == []
