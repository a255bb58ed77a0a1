"""Semi-supervised multi-label image classification with CLIP: CBSA on PyTorch Lightning."""

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
    # Lightning takes seconds to import; what does without it (inference, readers) should not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
