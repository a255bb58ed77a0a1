"""The folder of a run and the files in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.io.files import replacing, writing

CONFIG = "config.yaml"
SPLIT = "split.json"
LABEL_MASK = "label_mask.json"  # with data.known_fraction or known_file
LABELED = "labeled.parquet"
METRICS = "metrics.csv"
PREDICTIONS = "predictions.csv"
PICTURES = "pictures"
THRESHOLDS = "thresholds.csv"
LABELS = "labels.csv"
NEXT_TO_LABEL = "next_to_label.csv"
SUSPICIOUS_LABELS = "suspicious_labels.csv"
CHANGES = "changes.csv"  # with --init_from
REPORT_PAGE = "report.html"
CHECKPOINTS = "checkpoints"
WANDB_ID = "wandb_id.txt"
RUN_ID = "run_id.txt"  # only folders of `cbsa fit` contain it
# Files that are written when training ends.
WRITTEN = (PREDICTIONS, THRESHOLDS, PICTURES, LABELS, NEXT_TO_LABEL, SUSPICIOUS_LABELS, CHANGES, REPORT_PAGE)
RESULTS = (CONFIG, SPLIT, LABEL_MASK, LABELED, METRICS, *WRITTEN, CHECKPOINTS, WANDB_ID, RUN_ID)

_LOCK = ".lock"
_ENDING = 10.0  # seconds; after a process is killed, its loader workers keep the lock for up to 5 s
_FOLDERS: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def folder_of(trainer: Trainer) -> Path | None:
    """Returns the folder of a trainer's run, or None for a ``fast_dev_run``. Must be called on all ranks.

    The folder is that of the first logger that creates one per run (CSV, TensorBoard). If there is no such logger, it
    is the next free ``version_N`` below the first logger's ``save_dir`` and name, or below ``runs/cbsa``.
    """
    if bool(getattr(trainer, "fast_dev_run", False)):
        return None
    if trainer not in _FOLDERS:
        place = str(_new_folder(trainer)) if trainer.is_global_zero else ""
        _FOLDERS[trainer] = Path(trainer.strategy.broadcast(place))
    return _FOLDERS[trainer]


def set_folder(trainer: Trainer, folder: Path) -> None:
    """Sets the folder of a trainer's run."""
    _FOLDERS[trainer] = folder


def _new_folder(trainer: Trainer) -> Path:
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            return Path(logger.log_dir)
    root, name = Path(trainer.default_root_dir) / "runs", "cbsa"
    if trainer.loggers:
        first = trainer.loggers[0]
        root, name = Path(first.save_dir) if first.save_dir else root, str(first.name or name)
    return next_version(root / name)


def next_version(parent: Path) -> Path:
    """Creates the next free ``version_N`` in ``parent``. Several processes may call this at the same time."""
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        known = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
        for number in count(max((int(name) for name in known if name.isdigit()), default=-1) + 1):
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    raise AssertionError("count() does not end")


def taken(folder: Path, names: tuple[str, ...] = RESULTS) -> list[str]:
    """Returns those of ``names`` that exist in ``folder``."""
    return [name for name in names if os.path.lexists(folder / name)]


def refuse_taken(folder: Path, names: tuple[str, ...] = RESULTS) -> None:
    """Checks that a new run in ``folder`` would not overwrite existing files.

    Raises:
        ConfigError: If it would overwrite files. The message names them.
    """
    if found := taken(folder, names):
        raise ConfigError(
            f"{folder} contains {listed(found)}, which a new run would overwrite. Give the logger another version or "
            f"save_dir, or resume the existing run: `cbsa fit --resume {folder}`."
        )


# Resumable runs ----------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Returns whether ``folder`` is the folder of a training run. Folders of evaluations do not count."""
    return (folder / RUN_ID).is_file()


def runs_below(folder: Path) -> list[Path]:
    """Returns all folders of training runs, with a configuration, among ``folder`` and the folders below it."""
    return sorted(file.parent for file in folder.rglob(RUN_ID) if (file.parent / CONFIG).is_file())


def last_written(run: Path) -> int:
    """Returns the time of the last write to a run's files, in nanoseconds."""
    files = [run / CONFIG, run / METRICS, *run.rglob("*.ckpt")]
    return max(file.stat().st_mtime_ns for file in files if file.is_file())


def run_id(folder: Path) -> str | None:
    """Returns the unique id of the run in ``folder``. The checkpoints of the run contain the same id."""
    return _noted(folder / RUN_ID)


def wandb_id(folder: Path) -> str | None:
    """Returns the W&B id of the run, if it has one."""
    return _noted(folder / WANDB_ID)


def _noted(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def note(file: Path, text: str) -> None:
    """Writes a short text file atomically."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8")


def new_id() -> str:
    """Returns a unique id for a run."""
    return uuid.uuid4().hex


def checkpoint_folders(run: Path) -> list[Path]:
    """Returns the folders that contain a run's checkpoints: its own and each ``dirpath`` in its configuration."""
    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # the error is reported when the run is set up
        config = None
    return list(dict.fromkeys([run, *(Path(place).expanduser() for place in _dirpaths(config))]))


def _dirpaths(config: Any) -> Iterator[str]:
    if not isinstance(config, dict):
        return
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for settings in (config.get("checkpoint"), *(entry.get("init_args") for entry in callbacks)):
        if settings and settings.get("dirpath"):
            yield settings["dirpath"]


# One process at a time ---------------------------------------------------------------------------------------------


def lock(folder: Path, wait: float = 0.0) -> ExitStack | None:
    """Locks a folder until the returned stack is closed. Returns None if another process has locked it.

    If the process ends or crashes, the operating system releases the lock.
    """
    with writing(folder / _LOCK):  # the errors of FileLock do not include a remedy
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()
    locked = ExitStack()
    try:
        locked.enter_context(FileLock(folder / _LOCK).acquire(timeout=wait))
    except Timeout:
        return None
    return locked


def hold(folder: Path) -> ExitStack:
    """Prevents other jobs from training the run in ``folder`` until the returned stack is closed.

    Only the first process of a job acquires the lock, on behalf of all processes of the job.

    Raises:
        ConfigError: If another process is training the run.
    """
    if not _is_first_process():
        return ExitStack()
    locked = lock(folder, _ENDING)
    if locked is None:
        raise ConfigError(f"{folder} is being trained by another process; wait until it has ended, or stop it.")
    return locked


def _is_first_process() -> bool:
    """Returns whether this is the first process of its job.

    The result depends only on environment variables, because no Trainer exists yet.
    """
    node = os.environ.get("NODE_RANK", "0") if "RANK" not in os.environ else "0"
    return rank() == 0 and node == "0"


def rank() -> int:
    """Returns the rank of this process according to Lightning."""
    return getattr(rank_zero_only, "rank", None) or 0
