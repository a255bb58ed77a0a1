"""Runs that are killed at any time, or fail while they write a checkpoint, resume with bit-identical results."""

from __future__ import annotations

import errno
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from killing import CONFIGS, POLICIES, command, fit, in_a_process, left_behind, unlike, words_of

from cbsa_lightning.checkpoints.files import newest_checkpoint
from tiny_data import Squares

pytestmark = pytest.mark.slow
KILLS = 75  # fifteen per policy


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, clip_folder, squares):
    """Returns, for each policy, the final state of an uninterrupted run and its duration in seconds."""
    found = {}
    for policy in POLICIES:
        run = tmp_path_factory.mktemp("whole") / "run"
        log = run.parent / "log"
        assert in_a_process(partial(fit, run, clip_folder, squares, policy), log) == 0, log.read_text()
        again, begun = run.parent / "again", time.monotonic()
        assert in_a_process(partial(fit, again, clip_folder, squares, policy), log) == 0
        found[policy] = left_behind(run), time.monotonic() - begun
        assert unlike(found[policy][0], left_behind(again)) == []  # otherwise the comparisons would be meaningless
    return found


def finish(do, run, log, expected):
    assert in_a_process(do, log) == 0, log.read_text()
    assert unlike(expected, left_behind(run)) == []


def test_killed_at_random_moments(tmp_path, clip_folder, squares, whole, capsys):
    rng = np.random.default_rng(0)
    killed, mismatches = [], []
    for number in range(KILLS):
        policy = list(POLICIES)[number % len(POLICIES)]
        expected, seconds = whole[policy]
        run, log = tmp_path / f"{number}" / "run", tmp_path / f"{number}.log"
        do = partial(fit, run, clip_folder, squares, policy)
        for _ in range(1 + number % 3):  # some runs are killed two or three times
            moment = float(rng.uniform(0.05, 1.0)) * seconds
            ended = in_a_process(do, log, kill=(moment, signal.SIGKILL))
            assert ended in (-signal.SIGKILL, 0), log.read_text()
            killed += [number] if ended else []
        assert in_a_process(do, log) == 0, log.read_text()
        if difference := unlike(expected, left_behind(run)):
            mismatches.append((number, policy, difference[:5]))
    with capsys.disabled():
        print(f"\n{len(killed)} kills of {KILLS} runs, {len(mismatches)} mismatches")
    assert len(killed) >= 50
    assert mismatches == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_sigterm_writes_a_checkpoint_of_the_last_step(tmp_path, clip_folder, squares, whole, share):
    """After SIGTERM, no step is lost, regardless of the interval of checkpoints."""
    policy = "at the epoch's end"
    expected, seconds = whole[policy]
    run, log = tmp_path / "run", tmp_path / "log"
    do = partial(fit, run, clip_folder, squares, policy)
    ended = in_a_process(do, log, kill=(share * seconds, signal.SIGTERM))
    if ended == 9:  # the process stopped on the signal, and neither before its start nor after its end
        assert (run / "checkpoints" / "last.ckpt").exists()
    finish(do, run, log, expected)


def dying(write, moment):
    """Returns a torch.save that writes half of the file and kills its process at the ``moment``-th call."""
    calls = []

    def save(checkpoint, stream):
        calls.append(1)
        if len(calls) < moment:
            return write(checkpoint, stream)
        write(checkpoint, stream)
        stream.truncate(stream.tell() // 2)
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return save


@pytest.mark.parametrize("moment", [1, 4, 9, 14])
def test_killed_while_writing_a_checkpoint(tmp_path, clip_folder, squares, whole, moment):
    run, log, policy = tmp_path / "run", tmp_path / "log", "every step"

    def half():
        torch.save = dying(torch.save, moment)
        fit(run, clip_folder, squares, policy)

    assert in_a_process(half, log) == -signal.SIGKILL, log.read_text()
    assert len(list((run / "checkpoints").glob(".*.ckpt"))) == 1  # the partial file is not used as a checkpoint
    finish(partial(fit, run, clip_folder, squares, policy), run, log, whole[policy][0])


def failing(write, moment, error):
    calls = []

    def save(checkpoint, stream):
        calls.append(1)
        if len(calls) == moment:
            stream.write(b"half of it")
            raise error
        return write(checkpoint, stream)

    return save


@pytest.mark.parametrize("moment", [1, 5, 10])
def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path, clip_folder, squares, whole, moment):
    run, log, policy = tmp_path / "run", tmp_path / "log", "every step"

    def full():
        torch.save = failing(torch.save, moment, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        fit(run, clip_folder, squares, policy)

    assert in_a_process(full, log) == 1
    assert "could not be written (No space left on device)" in log.read_text()
    assert not list((run / "checkpoints").glob(".*"))
    finish(partial(fit, run, clip_folder, squares, policy), run, log, whole[policy][0])


@pytest.mark.parametrize("moment", [2, 7])
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_out_of_memory(tmp_path, clip_folder, squares, whole, where, moment):
    run, log, policy = tmp_path / "run", tmp_path / "log", "every third step, two validations an epoch"
    owner, name = {
        "forward": (torch.nn.functional, "scaled_dot_product_attention"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
    }[where]

    def without_memory():
        plain, calls = getattr(owner, name), []

        def fails(*args, **kwargs):
            calls.append(1)
            if len(calls) == moment * (10 if where == "forward" else 1):
                raise torch.OutOfMemoryError("out of memory")
            return plain(*args, **kwargs)

        setattr(owner, name, fails)
        fit(run, clip_folder, squares, policy)

    assert in_a_process(without_memory, log) == 1
    assert "OutOfMemoryError" in log.read_text()
    finish(partial(fit, run, clip_folder, squares, policy), run, log, whole[policy][0])


def test_the_command_killed_and_resumed(tmp_path, clip_folder):
    words = words_of(tmp_path, clip_folder)
    log, whole = tmp_path / "log", tmp_path / "whole"
    begun = time.monotonic()
    assert in_a_process(partial(command, [*words, f"--resume={whole}"], whole), log) == 0, log.read_text()
    seconds, expected = time.monotonic() - begun, left_behind(whole)
    for number, share in enumerate((0.5, 0.65, 0.8, 0.95)):
        run = tmp_path / f"run{number}"
        sent = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        in_a_process(partial(command, [*words, f"--resume={run}"], run), log, kill=(share * seconds, sent))
        # The same command starts and resumes the run. Once there is a checkpoint, the folder is sufficient.
        again = ["fit", f"--resume={run}"] if newest_checkpoint(run) else [*words, f"--resume={run}"]
        assert in_a_process(partial(command, again, run), log) == 0, log.read_text()
        assert unlike(expected, left_behind(run)) == [], sent


def test_the_wandb_run_keeps_its_id(tmp_path, clip_folder):
    words = [*words_of(tmp_path, clip_folder), f"--config={CONFIGS / 'loggers' / 'wandb.yaml'}"]
    words += [f"--trainer.logger+.init_args.save_dir={tmp_path}"]  # for the W&B logger, which is the last one
    log, run = tmp_path / "log", tmp_path / "run"
    os.environ["WANDB_MODE"] = "offline"
    for again in ([*words, f"--resume={run}"], ["fit", f"--resume={run}"]):
        assert in_a_process(partial(command, again, run), log) == 0, log.read_text()
    (first, second) = sorted(tmp_path.rglob("offline-run-*"))
    noted = (run / "wandb_id.txt").read_text().strip()
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == noted
