"""The version and the supported Python versions are consistent in all files that state them."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTS = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]


def test_the_package_and_the_citation_state_the_version_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert version("cbsa-lightning") == citation["version"] == PROJECT["version"]


def test_every_stated_python_version_is_tested():
    prefix = "Programming Language :: Python :: 3."
    stated = {item.rsplit(" ", 1)[1] for item in PROJECT["classifiers"] if item.startswith(prefix)}
    first = TESTS["checks"]["steps"][1]["with"]["python-version"]
    assert PROJECT["requires-python"] == f">={first}"
    assert {first, *TESTS["newer-python"]["strategy"]["matrix"]["python"]} == stated
