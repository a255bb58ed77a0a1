"""Many inputs of many kinds. Each kind runs in a process of its own, so that a crash is counted and survived."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import tempfile
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fuzz.harness import Outcome, Target, generator, judge, save, set_up

MEMORY = 3 << 30  # bytes that one input may take beside what the libraries have; more is a MemoryError
PATIENCE = 6  # so many time limits without a word, and the process is stuck in foreign code


class Found(NamedTuple):
    """A defect."""

    index: int
    what: str


class Tally(NamedTuple):
    """What the inputs of one target led to."""

    outcomes: Counter[str]
    defects: list[Found]


def run_target(target: Target, seed: int, start: int, inputs: int, out: Path, bar: tqdm[None]) -> Tally:
    """Runs inputs ``start`` to ``start + inputs`` of a target; the inputs of defects are kept in ``out``."""
    tally, end = Tally(Counter(), []), start + inputs
    index, lost = start, ""
    while index < end or lost:
        ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(target, seed, index, end, out, lost, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        if not ours.poll(300) or (message := _received(ours)) is None:
            raise RuntimeError(f"{target.name} cannot be prepared; see above")
        lost = ""
        while index < end and not lost:
            if not ours.poll(target.seconds * PATIENCE):
                worker.kill()
                lost = "hang: stuck in foreign code, where the time limit does not reach"
            elif (message := _received(ours)) is None:
                worker.join()
                lost = f"crash: the process ended with {worker.exitcode}"
            elif isinstance(message, str):
                raise RuntimeError(f"{target.name}, input {index}: cannot be drawn\n{message}")
            outcome = Outcome("defect", lost) if lost else message
            tally.outcomes[outcome.kind] += 1
            if outcome.defect:
                tally.defects.append(Found(index, outcome.defect))
            index += 1
            bar.update()
        worker.join()
        ours.close()
    return tally


def _received(pipe: Connection) -> Any:
    """What the process says next; None once it is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _work(target: Target, seed: int, start: int, end: int, out: Path, lost: str, pipe: Connection) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{target.name.replace(' ', '-')}-"))
    try:
        set_up(target, folder)
        out.mkdir(parents=True, exist_ok=True)
        log = os.open(out / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)  # libtiff and others write their remarks there
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if lost:  # on the input before: whoever read it could not keep it
            save(out, target, start - 1, target.draw(generator(seed, target, start - 1)), lost)
        pipe.send(True)
        for index in range(start, end):
            try:
                case = target.draw(generator(seed, target, index))
            except Exception:
                pipe.send(traceback.format_exc())
                return
            outcome = judge(target, case, folder)
            if outcome.defect:
                save(out, target, index, case, outcome.defect)
            pipe.send(outcome)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
