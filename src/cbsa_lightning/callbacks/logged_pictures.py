"""Logs the plots of a run to W&B and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image


def log_pictures(trainer: Any, files: Mapping[str, Path]) -> None:
    """Logs each file as ``pictures/<name>`` to all W&B and TensorBoard loggers; call it on the first process only.

    Args:
        trainer: The Trainer.
        files: PNG files by name.
    """
    for logger in trainer.loggers:
        for name, file in files.items():
            if isinstance(logger, WandbLogger):
                logger.log_image(f"pictures/{name}", [str(file)])
            elif isinstance(logger, TensorBoardLogger):
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
                logger.experiment.add_image(f"pictures/{name}", pixels, trainer.global_step, dataformats="HWC")
