"""The commands of `cbsa`: LightningCLI with overlays and `--resume`, `cbsa check`, `cbsa label` and `cbsa export`."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # These are names of earlier versions. They are imported lazily, since __main__ imports this package.
    if name in ("main", "entry_point"):
        return getattr(importlib.import_module("cbsa_lightning.__main__"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
