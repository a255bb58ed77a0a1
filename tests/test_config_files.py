"""Configurations are found by name from any folder, and paths in them are expanded."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jsonargparse import Namespace

from cbsa_lightning.cli.config_files import expand_paths, find_config, find_configs, shipped_configs
from cbsa_lightning.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["methods/cbsa.yaml", "configs/methods/cbsa.yaml", Path("methods/cbsa.yaml")])
def test_shipped_configurations_are_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == shipped_configs() / "methods/cbsa.yaml"


def test_existing_files_take_precedence(tmp_path, monkeypatch):
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
def test_errors_for_missing_configurations_suggest_similar_names(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_config(name)


def test_only_file_names_in_a_command_line_are_replaced(tmp_path, monkeypatch):
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Returns the package folder of an installed wheel, and a function that runs Python outside the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}

    def python(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return folder / "site" / "cbsa_lightning", python


def test_the_wheel_contains_the_configurations(installed):
    package, python = installed
    inside = {path.relative_to(package / "configs") for path in (package / "configs").rglob("*.yaml")}
    assert inside == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    found = python(
        "-c", "from cbsa_lightning.cli.config_files import find_config; print(find_config('methods/cbsa.yaml'))"
    )
    assert found.strip() == str(package / "configs/methods/cbsa.yaml")


def test_the_wheel_contains_the_report_template(installed):
    package, _ = installed
    template = Path("reports/page/page.html")
    assert (package / template).read_bytes() == (ROOT / "src/cbsa_lightning" / template).read_bytes()


@pytest.mark.slow
def test_an_installed_package_trains_and_predicts_outside_the_checkout(installed):
    package, python = installed
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--compare=false", "--report.enabled=false"]
    python(
        "-m", "cbsa_lightning", "fit", "--config", "configs/quickstart.yaml", *short, "--trainer.limit_val_batches=1"
    )
    assert "--shares" in python("-m", "cbsa_lightning", "table", "1", "--help")
    run = package.parents[1] / "runs/quickstart"
    (checkpoint,) = run.rglob("last.ckpt")
    config = checkpoint.parents[1] / "config.yaml"
    image = next((package.parents[1] / "data").rglob("*.png"))
    predict = [
        f"--config={config}",
        f"--ckpt_path={checkpoint}",
        f"--data.predict={image}",
        "--predictions.output=p.csv",
    ]
    python("-m", "cbsa_lightning", "predict", *predict)
    assert len((package.parents[1] / "p.csv").read_text().splitlines()) == 2
