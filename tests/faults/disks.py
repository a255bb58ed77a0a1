"""Full and read-only disks, and checks of the error messages."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cbsa_lightning import __main__ as cli
from cbsa_lightning.io import files

BALLAST = "ballast"


def _system(*words: str) -> None:
    """Runs a system command, or skips the test if it fails, because mounting needs privileges."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"{words[0]}: {error}")
    if done.returncode:
        pytest.skip(f"{' '.join(words[:1])} is not permitted: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[Path]:
    """Mounts a small file system at ``folder``."""
    folder.mkdir(parents=True)
    _system("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Makes a folder read-only, even for root."""
    _system("mount", "--bind", str(folder), str(folder))
    try:
        _system("mount", "-o", "remount,bind,ro", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> None:
    """Fills a disk except for ``left`` bytes."""
    with (disk / BALLAST).open("wb") as file:
        file.write(b"\0" * max(shutil.disk_usage(disk).free - left, 0))


def make_room(disk: Path) -> None:
    """Undoes :func:`fill`."""
    (disk / BALLAST).unlink()


@contextmanager
def short_files(size: int) -> Iterator[None]:
    """Limits the size of files of this process to ``size`` bytes; Python ignores the corresponding signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of all files below a folder, except the ballast."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != BALLAST)
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def filling_at(disk: Path, name: str, time: int, do: Callable[[], None]) -> Callable[[], None]:
    """Returns ``do`` with a disk that is filled directly before the file ``name`` is written for the ``time``-th time.

    The patch is not undone, so run the result in a separate process.
    """
    plain, seen = files.writing, []

    def writing(path: Path):
        if path.name == name:
            seen.append(path)
            if len(seen) == time:
                fill(disk)
        return plain(path)

    def patched() -> None:
        files.writing = writing
        do()

    return patched


def typed(words: Sequence[str]) -> None:
    """Runs the `cbsa` command as from a shell."""
    sys.argv = ["cbsa", *words]
    try:
        cli.entry_point()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python prints this text on exit
            print(stop.code, file=sys.stderr)
        if stop.code:
            raise


def told(log: Path, name: str, reason: str = "No space left on device") -> str:
    """Returns the error message of a command, which must name the file ``name``, and empties the log."""
    text = log.read_text()
    log.write_text("")
    assert "Traceback" not in text, text
    sentence = text.strip().splitlines()[-1]
    for part in ("Error: ", f"{name}", reason, "oom"):
        assert part in sentence, f"{part!r} is not in: {text}"
    return sentence
