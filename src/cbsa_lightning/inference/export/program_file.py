"""Writes and reads `model.pt2`, the graph in the format of `torch.export`."""

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
        OutputError: If the file cannot be written.
    """
    with replacing(file) as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about weights that share memory
        torch.export.save(program, draft, extra_files={_METADATA: json.dumps(dict(metadata))})


def read_program(file: Path) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], dict[str, str]]:
    """Reads a graph and its metadata. Without this library, ``torch.export.load(file).module()`` reads the graph.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    extra: dict[str, Any] = {_METADATA: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(file, extra_files=extra).module()
        return module, json.loads(extra[_METADATA])
    except Exception as error:  # for changed bytes, torch's reader can raise nearly any error
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: cannot be read as an exported program ({reason}). Export it again.") from error
