"""`cbsa fit --resume [FOLDER]`: finds a run again, and the place to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from cbsa_lightning.checkpoint_files import newest_checkpoint, remove_drafts
from cbsa_lightning.errors import ConfigError

WANDB_ID = "wandb_id.txt"
_FLAG = "--resume"


class Resumed(NamedTuple):
    """A run that goes on.

    Attributes:
        words: The command line without ``--resume``: with the run's configuration and checkpoint.
        folder: The run's folder, made if it is new; None without ``--resume``.
        wandb_id: Id of its W&B run, if it has one.
    """

    words: list[str]
    folder: Path | None = None
    wandb_id: str | None = None


def resumed(words: Sequence[str]) -> Resumed:
    """Replaces ``--resume [FOLDER]`` in a command line.

    Without ``--config`` the run's own ``config.yaml`` is taken; FOLDER is a run's folder, or one above several, of
    which the newest is meant; by default ``runs``. With ``--config`` FOLDER is where the run is or will be: the same
    command begins it and goes on with it.

    Raises:
        ConfigError: If there is nothing to resume, or the words contradict each other.
    """
    rest, found, folder = _taken_out(list(words))
    if not found:
        return Resumed(rest)
    if rest[:1] != ["fit"]:
        raise ConfigError(f"{_FLAG} goes with `cbsa fit` only.")
    if any(word.split("=")[0] == "--ckpt_path" for word in rest):
        raise ConfigError(f"{_FLAG} finds the checkpoint itself; leave out --ckpt_path, or {_FLAG}.")
    configured = any(word.split("=")[0] in ("--config", "-c") for word in rest)
    if configured:
        if folder is None:
            raise ConfigError(f"With --config say which run is meant: {_FLAG} FOLDER.")
        run = folder
        if not (run / "config.yaml").exists() and (others := sorted(run.rglob("config.yaml"))):
            raise ConfigError(f"{run} is no run but holds some, such as {others[0].parent}: say which one is meant.")
    else:
        run = _newest_run(folder if folder is not None else Path("runs"))
        rest[1:1] = [f"--config={run / 'config.yaml'}"]
    remove_drafts(run)
    checkpoint = newest_checkpoint(run) if run.is_dir() else None
    if checkpoint is not None:
        _tell(f"Going on with the run in {run}, from {checkpoint.relative_to(run)}.")
        rest.append(f"--ckpt_path={checkpoint}")
    else:
        _tell(f"The run in {run} has no whole checkpoint yet: it begins at its beginning.")
    noted = run / WANDB_ID
    return Resumed(rest, run, noted.read_text(encoding="utf-8").strip() if noted.is_file() else None)


@rank_zero_only
def _tell(text: str) -> None:
    print(text)


def _taken_out(words: list[str]) -> tuple[list[str], bool, Path | None]:
    for i, word in enumerate(words):
        if word.startswith(f"{_FLAG}="):
            return words[:i] + words[i + 1 :], True, Path(word.partition("=")[2])
        if word == _FLAG:
            given = words[i + 1 : i + 2] if not words[i + 1 : i + 2] or not words[i + 1].startswith("-") else []
            return words[:i] + words[i + 1 + len(given) :], True, Path(given[0]) if given else None
    return words, False, None


def _newest_run(folder: Path) -> Path:
    if (folder / "config.yaml").is_file():
        return folder
    runs = sorted(file.parent for file in folder.rglob("config.yaml")) if folder.is_dir() else []
    if not runs:
        raise ConfigError(
            f"{folder} holds no run: there is no config.yaml in or below it. Give the folder of a run, such as "
            "runs/cbsa/version_0."
        )
    return max(runs, key=_last_written)


def _last_written(run: Path) -> int:
    files = [run / "config.yaml", *run.rglob("*.ckpt")]
    return max(file.stat().st_mtime_ns for file in files)
