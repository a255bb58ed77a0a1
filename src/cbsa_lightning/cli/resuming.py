"""`cbsa fit --resume [FOLDER]`: finds a run and the checkpoint to resume it from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from cbsa_lightning.checkpoints.files import checkpoint_files, newest_checkpoint, remove_drafts
from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.io import runs
from cbsa_lightning.training.loggers import MetricsFile

_FLAG = "--resume"


class Resumed(NamedTuple):
    """A run to be resumed.

    Attributes:
        words: The command line without ``--resume``, with the run's configuration and checkpoint.
        folder: The run's folder, created if it is new; None without ``--resume``.
        wandb_id: ID of its W&B run, if it has one.
    """

    words: list[str]
    folder: Path | None = None
    wandb_id: str | None = None


@contextmanager
def resumed(words: Sequence[str]) -> Iterator[Resumed]:
    """Replaces ``--resume [FOLDER]`` in a command line, and locks the run against other jobs.

    Without ``--config``, FOLDER is a run or a folder of runs (default ``runs``), of which the newest is used, together
    with its ``config.yaml``. With ``--config``, FOLDER is the folder of the run, and the same command starts the run
    and later resumes it.

    Raises:
        ConfigError: If there is nothing to resume, another process trains the run, or the arguments contradict each
            other.
    """
    rest, found, folder = _taken_out(list(words))
    if not found:
        yield Resumed(rest)
        return
    if rest[:1] != ["fit"]:
        raise ConfigError(f"{_FLAG} works only with `cbsa fit`.")
    if any(word.split("=")[0] == "--ckpt_path" for word in rest):
        raise ConfigError(f"{_FLAG} finds the checkpoint itself; use either --ckpt_path or {_FLAG}.")
    if any(word.split("=")[0] == "--init_from" for word in rest):
        raise ConfigError(
            f"--init_from starts a new run, whereas {_FLAG} resumes one from its own weights; use only one of "
            "these options."
        )
    if any(word.split("=")[0] in ("--config", "-c") for word in rest):
        run = _named_run(folder)
    else:
        run = _newest_run(folder if folder is not None else Path("runs"))
        rest[1:1] = [f"--config={run / runs.CONFIG}"]
    with runs.hold(run):
        checkpoint = _place_to_go_on(run)
        if checkpoint is not None:
            _tell(f"Resuming the run in {run}, from {_within(checkpoint, run)}.")
            rest.append(f"--ckpt_path={checkpoint}")
        else:
            _tell(f"The run in {run} has no complete checkpoint yet: starting from the beginning.")
        yield Resumed(rest, run, runs.wandb_id(run))


def _place_to_go_on(run: Path) -> Path | None:
    """Returns the run's newest checkpoint, or None if the run can restart without losing anything.

    Raises:
        ConfigError: If the run has weights or metrics, but no checkpoint to resume from.
    """
    if not runs.is_run(run):
        return None
    remove_drafts(run)
    folders = runs.checkpoint_folders(run)
    checkpoint = newest_checkpoint(*folders, run_id=runs.run_id(run))
    if checkpoint is None and (files := checkpoint_files(*folders)):
        raise ConfigError(
            f"{run} has no checkpoint to resume from. The following files have only weights, are damaged, or belong to "
            f"another run: {listed((str(_within(file, run)) for file in files), 3)}. Start a new run."
        )
    if checkpoint is None and _has_finished_an_epoch(run):
        raise ConfigError(
            f"{run} has metrics of finished epochs, but no checkpoint to resume from. Start a new run, or "
            "restore its checkpoints."
        )
    return checkpoint


def _has_finished_an_epoch(run: Path) -> bool:
    """Returns whether the files of a run without a checkpoint show a finished epoch."""
    rows = MetricsFile(run).metrics
    return (run / runs.PREDICTIONS).exists() or any(float(row.get("epoch", 0)) >= 1 for row in rows)


def _within(file: Path, run: Path) -> Path:
    return file.relative_to(run) if file.is_relative_to(run) else file


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


def _named_run(folder: Path | None) -> Path:
    """Returns the folder for ``--config``: that of a run, or one without files that a new run would overwrite."""
    if folder is None:
        raise ConfigError(f"With --config, name the run: {_FLAG} FOLDER.")
    if not runs.is_run(folder):
        if others := runs.runs_below(folder):
            raise ConfigError(f"{folder} is not a run but contains runs, such as {others[0]}. Name one of them.")
        if found := runs.taken(folder):
            raise ConfigError(
                f"{folder} has {listed(found)}, but is not a run of `cbsa fit`: it has no {runs.RUN_ID}. "
                f"Use another folder for {_FLAG}."
            )
    return folder


def _newest_run(folder: Path) -> Path:
    found = [folder] if runs.is_run(folder) else runs.runs_below(folder)
    if not found:
        raise ConfigError(
            f"{folder} has no run: no folder in it has a {runs.CONFIG} and a {runs.RUN_ID}, which `cbsa fit` "
            "writes. Use the folder of a run, such as runs/cbsa/version_0."
        )
    return max(found, key=runs.last_written)
