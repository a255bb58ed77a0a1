"""Reads the run folder or checkpoint file that is passed to ``--init_from``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cbsa_lightning.checkpoints.files import RUN, local, newest_checkpoint, read_checkpoint
from cbsa_lightning.checkpoints.warm_start import Earlier
from cbsa_lightning.data.labeled_images import LabeledImages
from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.io import runs


class EarlierRun(NamedTuple):
    """An earlier run, as found on disk.

    Attributes:
        file: The checkpoint.
        weights: The weights for a new run.
        labeled: The images whose labels the run used; None if no run folder with this list was found.
    """

    file: Path
    weights: Earlier
    labeled: LabeledImages | None


def read_earlier(place: str) -> EarlierRun:
    """Reads the given checkpoint or the newest one of a run, and the run's list of labeled images.

    Args:
        place: Run folder or checkpoint file. The list of a checkpoint is read from the run folder that
            contains the checkpoint, if that run wrote it.

    Raises:
        CheckpointError: If there is no checkpoint, or the checkpoint cannot be used.
        DataError: If the list of labeled images is damaged.
    """
    path = local(place)
    if not path.exists():
        raise CheckpointError(
            f"--init_from {place} does not exist. Use the folder of a finished run, such as runs/cbsa/version_0, or a "
            "checkpoint file. The file must exist until the new run ends."
        )
    file = _newest(path) if path.is_dir() else path
    checkpoint = read_checkpoint(file, ("state_dict", "class_names"))
    written_by = checkpoint.get(RUN)
    homes = [path] if path.is_dir() else file.resolve().parents[:2]
    home = next((p for p in homes if written_by is not None and runs.run_id(p) == written_by), None)
    record = None if home is None else home / runs.LABELED
    labeled = LabeledImages.read(record) if record is not None and record.is_file() else None
    return EarlierRun(file, Earlier.of(checkpoint), labeled)


def _newest(folder: Path) -> Path:
    if not runs.is_run(folder):
        raise CheckpointError(
            f"{folder} is not a run: it has no {runs.RUN_ID}, which `cbsa fit` writes. Set --init_from to the folder "
            "of a finished run, such as runs/cbsa/version_0, or a checkpoint."
        )
    found = newest_checkpoint(*runs.checkpoint_folders(folder), run_id=runs.run_id(folder))
    if found is None:
        raise CheckpointError(f"{folder} has no complete checkpoint of its run. Set --init_from to another run.")
    return found
