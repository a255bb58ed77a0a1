"""The commands: LightningCLI with overlays, `--resume`, `cbsa check` and `cbsa label`."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in (
        "main",
        "entry_point",
    ):  # documented here before version 0.2; by name, since __main__ imports this folder
        return getattr(importlib.import_module("cbsa_lightning.__main__"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
