"""Finds the checkpoint of a run, and names the version of its model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.io.runs import CHECKPOINTS

NAME = "last.ckpt"


def checkpoint_of(run: Path) -> Path:
    """Returns the last checkpoint of a run.

    Raises:
        ConfigError: If the run has no checkpoint.
    """
    file = run / CHECKPOINTS / NAME
    if not file.is_file():
        raise ConfigError(f"{file} does not exist. Use the folder of a finished run, such as runs/cbsa/version_0.")
    return file


def checkpoint_and_run(source: Path) -> tuple[Path, Path | None]:
    """Returns the checkpoint and the folder of a run, from either of them; see :func:`checkpoint_of`, :func:`run_of`.

    Raises:
        ConfigError: If the run has no checkpoint.
    """
    return (source, run_of(source)) if source.is_file() else (checkpoint_of(source), source)


def version_of(run: Path) -> str:
    """Returns the run's name and the start of its checkpoint's SHA-256, such as "cbsa-version_0-1a2b3c4d"."""
    with checkpoint_of(run).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = run.resolve()
    return f"{folder.parent.name}-{folder.name}-{digest[:8]}"


def run_of(checkpoint: Path) -> Path | None:
    """Returns the run that a checkpoint belongs to, or None if the checkpoint is not in a run's folder."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS else None
