"""Reads checkpoint files without running code; rejects damaged files and files that are not from this library."""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cbsa_lightning.errors import CheckpointError, DataError, listed
from cbsa_lightning.io.reading import open_regular

TORN = "written_within_a_step"
VERSION = "cbsa_lightning_version"
RUN = "run_id"  # ID of the run that wrote the checkpoint
MODEL = "model_config"  # the model's section of the configuration, as YAML
SOURCE = "read_from"  # path of the file; added when reading


def read_checkpoint(path: str | os.PathLike[str], needed: tuple[str, ...] = ("state_dict",)) -> dict[str, Any]:
    """Reads a checkpoint without running code from it.

    Args:
        path: A local file.
        needed: Names of the required entries.

    Returns:
        The checkpoint on the CPU, with the path of the file under :data:`SOURCE`.

    Raises:
        CheckpointError: If the file cannot be opened, is damaged, is not a checkpoint of this library, or was written
            during a step.
    """
    file = local(path)
    try:
        with open_regular(file) as stream:
            _check_whole(file, stream)
            stream.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about files that are rejected below
                checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error.strerror or error}.") from error
    except CheckpointError:
        raise
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # for changed bytes, torch's reader can raise nearly any error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} is damaged, or cannot be read without running code from it ({reason}). Use "
            "a .ckpt file that cbsa_lightning saved."
        ) from error
    _check_form(file, checkpoint, needed)
    if checkpoint.get(TORN):
        raise CheckpointError(
            f"{file} was written during an optimizer step, so it is inconsistent; use another checkpoint."
        )
    checkpoint[SOURCE] = str(file)
    return checkpoint  # type: ignore[no-any-return]


def newest_checkpoint(*folders: Path, run_id: str | None = None) -> Path | None:
    """Returns the complete checkpoint below ``folders`` with the most optimizer steps, or None if there is none.

    Files that are damaged, truncated or written during a step are skipped with a warning that states the reason.

    Args:
        folders: Folders to search.
        run_id: ID of the run that the checkpoint must belong to. None accepts any run.
    """
    found: list[tuple[int, int, int, Path]] = []
    for file in checkpoint_files(*folders):
        try:
            checkpoint = read_checkpoint(file, ("state_dict", "loops", "epoch", "global_step"))
            if "optimizer_states" not in checkpoint:  # for example, a file with only the best weights
                continue
            if run_id is not None and checkpoint.get(RUN) != run_id:
                continue
            epoch, step = int(checkpoint["epoch"]), int(checkpoint["global_step"])
        except (CheckpointError, TypeError, ValueError) as error:
            warnings.warn(f"Skipped: {error}", stacklevel=2)
            continue
        found.append((step, epoch, file.stat().st_mtime_ns, file))
    return max(found)[-1] if found else None


def checkpoint_files(*folders: Path) -> list[Path]:
    """Returns all checkpoints below ``folders`` except temporary files."""
    files = {file.resolve(): file for folder in folders for file in sorted(folder.rglob("*.ckpt"))}
    return [file for file in files.values() if not file.name.startswith(".")]


def remove_drafts(folder: Path) -> None:
    """Deletes temporary checkpoint files left by killed processes; call it only if the run is not active."""
    for draft in folder.rglob(".*.ckpt"):
        draft.unlink(missing_ok=True)


def local(path: str | os.PathLike[str]) -> Path:
    """Converts a local path; rejects a URL.

    Raises:
        CheckpointError: If the path is a URL.
    """
    if "://" in os.fspath(path):
        raise CheckpointError(
            f"{path}: checkpoints are read from and written to local files only. Copy the file first."
        )
    return Path(path)


def _check_whole(file: Path, stream: BinaryIO) -> None:
    """Compares every part with its checksum, because torch's reader detects missing bytes but not changed ones."""
    try:
        with zipfile.ZipFile(stream) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise CheckpointError(f"{file} is compressed, so it is not a checkpoint written by torch.")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} is damaged or not a checkpoint ({error}). It may have been truncated while it was written or "
            "copied. Use an earlier checkpoint."
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{file} is damaged: the checksum of {damaged} is wrong. Copy it again or use another.")


def _check_form(file: Path, checkpoint: Any, needed: tuple[str, ...]) -> None:
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file} contains a {type(checkpoint).__name__}, not a checkpoint.")
    if lacking := [key for key in needed if key not in checkpoint]:
        raise CheckpointError(f"{file} is not a checkpoint of this library: it has no {listed(lacking)}.")
    for key in ("state_dict", "hyper_parameters", "loops"):
        if key in checkpoint and not isinstance(checkpoint[key], dict):
            raise CheckpointError(f"{file}: {key} must be a mapping, found a {type(checkpoint[key]).__name__}.")
    names = checkpoint.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: class_names must be a list of strings, found {names!r:.100}.")
