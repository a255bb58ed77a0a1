"""The agent of W&B runs `configs/sweep.yaml` with flags that the command line accepts."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from cbsa_lightning.cli import lightning_cli
from cbsa_lightning.cli.config_files import find_configs
from parsed import Parsed
from tiny_tables import CONFIGS


@pytest.fixture
def sweep() -> dict[str, Any]:
    found = load_sweep_config(str(CONFIGS / "sweep.yaml"))
    assert found is not None
    return found


def lowest(parameter: dict[str, Any]) -> Any:
    return parameter["values"][0] if "values" in parameter else parameter["min"]


def test_each_parameter_reaches_the_run(sweep: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: lowest(parameter) for name, parameter in sweep["parameters"].items()}
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})["args"]
    command = create_sweep_command(sweep["command"])
    place = command.index("${args}")
    program, subcommand, *words = [*command[:place], *flags, *command[place + 1 :]]
    assert (program, subcommand) == ("cbsa", "fit")
    monkeypatch.setattr(lightning_cli, "CBSACLI", Parsed)
    cli = lightning_cli.make_cli(find_configs(words), run=False)
    config = yaml.safe_load(cli.parser.dump(cli.config))
    assert config["model"]["init_args"]["unsup_weight"] == chosen["model.init_args.unsup_weight"]
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == chosen["model.optimizer.lr"]
    assert config["data"]["batch_size"] == chosen["data.batch_size"]
    assert config["trainer"]["logger"][1]["class_path"].endswith("WandbLogger")


def test_the_sweep_maximizes_a_logged_metric(sweep: dict[str, Any]) -> None:
    assert sweep["metric"] == {"name": "val/mAP", "goal": "maximize"}
    assert sweep["method"] == "random"
    assert sweep["program"] == "cbsa"
