"""Configurations are found by name wherever one works, and paths in them are expanded."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jsonargparse import Namespace

from cbsa_lightning.config_files import expand_paths, find_config, find_configs, shipped_configs
from cbsa_lightning.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["methods/cbsa.yaml", "configs/methods/cbsa.yaml", Path("methods/cbsa.yaml")])
def test_the_librarys_own_are_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == shipped_configs() / "methods/cbsa.yaml"


def test_a_file_that_is_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/cbsa.yaml").write_text("trainer: {max_epochs: 1}")
    assert find_config("methods/cbsa.yaml") == Path("methods/cbsa.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("methods/cbsa_save.yaml", r"methods/cbsa_safe\.yaml"),
        ("nothing.like.it", "found by name"),
        ("$UNSET_VARIABLE/a.yaml", r"\$UNSET_VARIABLE is not set"),
    ],
)
def test_missing_ones_are_named_with_similar_ones(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_config(name)


def test_only_file_names_of_a_command_line_are_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(shipped_configs() / "quickstart.yaml")
    words = [
        "fit",
        "--config",
        "quickstart.yaml",
        "-c=quickstart.yaml",
        "--config={trainer: {max_epochs: 1}}",
        "--a",
        "b",
    ]
    assert find_configs(words) == ["fit", "--config", file, f"-c={file}", *words[4:]]


def test_home_and_variables_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    config = Namespace(a="~/x.csv", b=Namespace(c=["$DATA/y", "${DATA}/z"], d={"e": "$DATA"}), f="US$", g="a~b", h=3)
    assert expand_paths(config) == Namespace(
        a="/home/me/x.csv", b=Namespace(c=["/data/y", "/data/z"], d={"e": "/data"}), f="US$", g="a~b", h=3
    )
    with pytest.raises(ConfigError, match=r"\$NOWHERE is not set"):
        expand_paths("$NOWHERE/x")


def test_the_wheel_holds_the_configurations(tmp_path):
    pytest.importorskip("hatchling")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n.removeprefix("cbsa_lightning/configs/") for n in archive.namelist() if "/configs/" in n}
        archive.extractall(tmp_path / "site")
    assert inside == {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    run = "from cbsa_lightning.config_files import find_config; print(find_config('methods/cbsa.yaml'))"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert found == str(tmp_path / "site/cbsa_lightning/configs/methods/cbsa.yaml")
