"""The commands: LightningCLI with overlays, `--resume`, `cbsa check` and `cbsa label`."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Names of earlier versions; imported lazily, since __main__ imports this folder.
    if name in ("main", "entry_point"):
        return getattr(importlib.import_module("cbsa_lightning.__main__"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
