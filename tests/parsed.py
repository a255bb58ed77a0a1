"""Parses configurations without building anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbsa_lightning.cli import lightning_cli


class Parsed(lightning_cli.CBSACLI):
    """Parses the command line and builds nothing."""

    def instantiate_classes(self) -> None:
        self.model = self.trainer = self.datamodule = None


def parse(files: Iterable[Path]) -> dict[str, Any]:
    """Returns the merged settings of configuration files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_cli, "CBSACLI", Parsed)
        cli = lightning_cli.make_cli([f"--config={file}" for file in files], run=False)
    return yaml.safe_load(cli.parser.dump(cli.config))
