"""What a kind of input is, and the judgment of what one input leads to."""

from __future__ import annotations

import contextlib
import signal
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbsa_lightning.errors import CBSAError

PARSER = "refused by the parser"
LONGEST_MESSAGE = 10_000  # characters: whoever reads more than this on a terminal has lost what it is about


class Silence(Exception):
    """A result that is not what the input says."""


class Refusal(Exception):
    """A refusal by other means than our errors that counts as clear, such as jsonargparse's."""


class Hang(BaseException):
    """The time limit; no Exception, so that no reader takes it for damaged input."""


@dataclass
class Case:
    """One input.

    Attributes:
        files: Name below the folder of the run -> content.
        options: What the reader is called with beside them.
        places: Texts of which an error must have one, so that it says where; the names of ``files`` by default.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What an input led to: "valid", the name of one of our errors, or a defect."""

    kind: str
    defect: str = ""


class Target(ABC):
    """A kind of input.

    Attributes:
        share: Of the inputs of a whole campaign, relative to the other targets.
        seconds: Time limit of one input.
        base: Sound files that stand in the folder where an input does not replace them.
    """

    name: str
    share: int
    seconds: float = 10.0
    base: dict[str, bytes]

    def __init__(self) -> None:
        self.base = {}

    def prepare(self, folder: Path) -> None:  # noqa: B027 - most have nothing to make
        """Makes what all inputs share, once."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Case:
        """One input; a function of ``rng`` alone."""

    @abstractmethod
    def run(self, case: Case, folder: Path) -> None:
        """Reads the input.

        Raises:
            Silence: The result is not what the input says.
        """


def generator(seed: int, target: Target, index: int) -> np.random.Generator:
    """Randomness of one input: of this target, whichever others run."""
    return np.random.default_rng([seed, zlib.crc32(target.name.encode()), index])


def set_up(target: Target, folder: Path) -> None:
    """Makes the folder in which the inputs of ``target`` are read."""
    folder.mkdir(parents=True, exist_ok=True)
    target.prepare(folder)
    for name, content in target.base.items():
        _write(folder / name, content)


def judge(target: Target, case: Case, folder: Path) -> Outcome:
    """Reads one input and says what came of it."""
    for name, content in case.files.items():
        _write(folder / name, content)
    try:
        with warnings.catch_warnings(), _limit(target.seconds):
            warnings.simplefilter("ignore")  # Pillow remarks on damaged metadata; the outcome is what counts
            target.run(case, folder)
        return Outcome("valid")
    except CBSAError as error:
        return _refusal(type(error).__name__, str(error), case)
    except Refusal as error:
        return _refusal(PARSER, str(error), case)
    except Hang:
        return Outcome("defect", f"hang: more than {target.seconds:g} s")
    except Silence as error:
        return Outcome("defect", f"silence: {error}")
    except (Exception, SystemExit) as error:
        return Outcome("defect", f"foreign {type(error).__name__} in {_raised_in(error)}: {str(error)[:300]}")
    finally:
        for name in case.files:
            if name in target.base:
                _write(folder / name, target.base[name])
            else:
                (folder / name).unlink(missing_ok=True)


def _refusal(kind: str, message: str, case: Case) -> Outcome:
    places = case.places or tuple(case.files)
    if not any(place in message for place in places):
        return Outcome("defect", f"no place: {kind} names none of {places[:3]}: {message[:300]}")
    if len(message) > LONGEST_MESSAGE and kind != PARSER:  # whose words are not ours to cut
        return Outcome("defect", f"message of {len(message)} characters: {kind} {message[:200]}")
    return Outcome(kind)


def _raised_in(error: BaseException) -> str:
    """The last line of our own code that the error passed through."""
    where, trace = "?", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "cbsa_lightning" in file:
            where = f"{file.rpartition('cbsa_lightning/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def save(folder: Path, target: Target, index: int, case: Case, defect: str) -> None:
    """Keeps the input of a defect, so that it can be looked at and run again."""
    here = folder / target.name / str(index)
    here.mkdir(parents=True, exist_ok=True)
    for name, content in case.files.items():
        _write(here / "files" / name, content)
    (here / "defect.txt").write_text(f"{defect}\n\noptions: {case.options!r}\n", encoding="utf-8", errors="replace")
