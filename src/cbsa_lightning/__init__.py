"""Semi-supervised multi-label image classification with CLIP: an implementation of CBSA in PyTorch Lightning."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbsa_lightning.data.datamodule import SSMLLDataModule
    from cbsa_lightning.inference.classifier import Classifier
    from cbsa_lightning.training.cbsa import CBSAModule
    from cbsa_lightning.training.module import SSMLLModule

__version__ = version("cbsa-lightning")
__all__ = ["CBSAModule", "Classifier", "SSMLLDataModule", "SSMLLModule", "__version__"]

_HOMES = {
    "CBSAModule": "cbsa_lightning.training.cbsa",
    "Classifier": "cbsa_lightning.inference.classifier",
    "SSMLLDataModule": "cbsa_lightning.data.datamodule",
    "SSMLLModule": "cbsa_lightning.training.module",
}


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import. Lazy imports let modules that do not need it (inference, readers) load quickly.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
