"""Writes `model.onnx`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.inference.export.scoring import INPUT, OUTPUTS
from cbsa_lightning.io.files import replacing

OPSET = 20
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Checks that the packages needed for the export are installed.

    Raises:
        ConfigError: If a package is missing; the message contains the command that installs it.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"The export needs {listed(missing)}: pip install 'cbsa-lightning[export]'.")


def write_onnx(
    program: torch.export.ExportedProgram, file: Path, extra: tuple[str, ...], metadata: Mapping[str, str]
) -> None:
    """Writes an exported graph as ONNX.

    Args:
        program: See :func:`~cbsa_lightning.inference.export.scoring.exported`.
        file: Output file.
        extra: Names of the outputs that follow :data:`~cbsa_lightning.inference.export.scoring.OUTPUTS`.
        metadata: The ``metadata_props`` of the file.

    Raises:
        OutputError: If the file cannot be written.
    """
    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[*OUTPUTS, *extra],
            opset_version=OPSET,
            verbose=False,
        )
    if converted is None:
        raise ConfigError(f"torch {torch.__version__} did not convert the model to ONNX.")
    _name_batch(converted.model)
    converted.model.metadata_props.update(metadata)
    with replacing(file) as draft:
        converted.save(draft, external_data=False)


def _name_batch(model: Any) -> None:
    """Names the first dimension of all inputs and outputs "batch" instead of torch's generated symbol."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape[0] = "batch"


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the converter's messages about skipped optimizations."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
