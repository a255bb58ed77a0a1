"""Writes checkpoints atomically and reads them without running code."""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import rank_zero_warn

from cbsa_lightning.checkpoints.files import TORN, local, read_checkpoint
from cbsa_lightning.errors import CheckpointError, causes
from cbsa_lightning.io.files import replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes atomically, whereas Lightning's own writer can leave a partial file.

    Checkpoints are read without running code from the file. Damaged files are rejected with an error that states the
    reason. Only local files are supported.

    If two consecutive checkpoints have the same state, such as the one of the newest epoch and ``last.ckpt``, they
    share one file through a hard link, provided that the file system supports it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._former: tuple[Path, Any] | None = None  # the last written file, and the step that it belongs to

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint.

        Raises:
            CheckpointError: If the disk is full or the folder is not writable; existing files are unchanged.
        """
        file = local(path)
        if checkpoint.get(TORN):  # weights, average and counters are inconsistent during a step
            rank_zero_warn(f"{file} is not written during a step; resume from an earlier checkpoint.")
            return
        try:
            with replacing(file) as draft, draft.open("wb") as stream:
                torch.save(checkpoint, stream)
            self._share(file, checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            cause = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
            if cause is None:
                raise
            raise CheckpointError(
                f"{file}: the checkpoint could not be written ({cause.strerror or cause}). Earlier checkpoints "
                "are unchanged. Free disk space or choose another folder, then resume with `cbsa fit --resume`."
            ) from error

    def _share(self, file: Path, checkpoint: dict[str, Any]) -> None:
        """Replaces the previous file with a hard link to this one if they differ at most in callback state."""
        progress = ("epoch", "global_step", "loops", "lr_schedulers")
        moment = copy.deepcopy((sorted(checkpoint), [checkpoint.get(key) for key in progress]))
        former, self._former = self._former, (file, moment)
        if former is None or former[0] == file or former[1] != moment:
            return
        with suppress(OSError):  # if the previous file is gone or hard links are unsupported, keep two files
            if _tensors_of(former[0]) == _tensors_of(file):
                with replacing(former[0]) as draft:
                    os.link(file, draft)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint; see :func:`~cbsa_lightning.checkpoints.files.read_checkpoint`."""
        return read_checkpoint(path, ("state_dict", "loops", "epoch", "global_step"))


def _tensors_of(file: Path) -> dict[str, tuple[int, int]]:
    """Returns the checksum and the size of each tensor in a checkpoint."""
    with zipfile.ZipFile(file) as archive:
        return {part.filename: (part.CRC, part.file_size) for part in archive.infolist() if "/data/" in part.filename}
