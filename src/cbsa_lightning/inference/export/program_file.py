"""Writes and reads `model.pt2`, the graph as `torch.export` saves it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.io.files import replacing

PROGRAM = "model.pt2"
_METADATA = "cbsa_lightning.json"


def write_program(program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str]) -> None:
    """Writes an exported graph with its metadata.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(file) as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about weights that share memory
        torch.export.save(program, draft, extra_files={_METADATA: json.dumps(dict(metadata))})


def read_program(file: Path) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], dict[str, str]]:
    """Reads a graph and its metadata. Only torch is needed for ``torch.export.load(file).module()``.

    Raises:
        CheckpointError: The file cannot be read.
    """
    extra: dict[str, Any] = {_METADATA: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(file, extra_files=extra).module()
        return module, json.loads(extra[_METADATA])
    except Exception as error:  # changed bytes make torch's reader raise nearly anything
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: cannot be read as an exported program ({reason}). Export it again.") from error
