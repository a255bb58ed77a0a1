"""Full disks and read-only folders: one clear error message, and no loss of existing files."""

from __future__ import annotations

import errno
import os
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from disks import contents, fill, filling_at, make_room, read_only, short_files, small_disk, told, typed
from killing import command, in_a_process, left_behind, unlike, words_of

from cbsa_lightning.checkpoints.files import newest_checkpoint, read_checkpoint
from cbsa_lightning.checkpoints.writing import WholeCheckpointIO
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.caches.store import RowStore
from cbsa_lightning.data.images import ImageFiles
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.data.splits import split_labeled
from cbsa_lightning.errors import CBSAError
from cbsa_lightning.inference.predictions import write_predictions
from cbsa_lightning.reproduce import cells
from cbsa_lightning.training.loggers import MetricsFile
from layouts import make_table
from tiny_data import Squares
from tiny_tables import CONFIGS, short, tiny_voc

FULL = os.strerror(errno.ENOSPC)
# Remove this when data/ raises OutputError.
LONG = os.strerror(errno.EFBIG)
FIXED = os.strerror(errno.EROFS)


# What writes one file ----------------------------------------------------------------------------------------------


def a_checkpoint(folder, version):
    WholeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((10_000,), version)}}, folder / "last.ckpt")


def some_metrics(folder, version):
    file = MetricsFile(folder)
    for step in range(5000):
        file.log_metrics({"loss": version}, step)
    file.save()


def some_hparams(folder, version):
    file = MetricsFile(folder)
    file.log_hparams({f"name{i}": version for i in range(1000)})
    file.log_metrics({"loss": version}, 0)
    file.save()


def some_predictions(folder, version, name):
    rows = 1000
    table = AnnotationTable(folder, np.array([f"{i}.jpg" for i in range(rows)], np.dtypes.StringDType()),
                            np.full((rows, 2), -1, np.int8), ("a", "b"))  # fmt: skip
    scores = np.random.default_rng(version).random((rows, 2), np.float32)
    write_predictions(folder / name, table, ["a", "b"], scores, scores > 0.5)


def a_result(folder, version):
    """Runs a cell, after removing the result of the previous run, which would otherwise be reused."""
    cell = SimpleNamespace(folder="cell")
    cells._run = lambda *_: {"history": [version] * 5000}
    (folder / "cell" / "result.json").unlink(missing_ok=True)
    cells.make(cell, folder)


def a_split(folder, version):
    split_labeled(2000, 0.1 * version, 1, table_digest="of a table").save(folder / "split.json")


WRITERS = {  # name: (function that writes, file)
    "checkpoint": (a_checkpoint, "last.ckpt"),
    "metrics": (some_metrics, "metrics.csv"),
    "hparams": (some_hparams, "hparams.yaml"),
    "CSV": (partial(some_predictions, name="predictions.csv"), "predictions.csv"),
    "Parquet": (partial(some_predictions, name="predictions.parquet"), "predictions.parquet"),
    "split": (a_split, "split.json"),
}
writers = pytest.mark.parametrize("writer", list(WRITERS))


def refused(do, name, reason):
    with pytest.raises(CBSAError) as error:
        do()
    text = str(error.value)
    assert re.search(f"{re.escape(name)}.*({reason})", text), text
    assert re.search("[Mm]ake room|choose|not a writable folder", text), text


@writers
@pytest.mark.parametrize("left", [0, 8192])
def test_errors_of_a_full_disk(tmp_path, writer, left):
    write, name = WRITERS[writer]
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, left)
        refused(lambda: write(disk, 1), name, FULL)
        assert contents(disk) == {}  # including partial files
        make_room(disk)
        write(disk, 1)
        before = contents(disk)
        fill(disk, left)
        refused(lambda: write(disk, 2), name, FULL)
        assert contents(disk) == before
        make_room(disk)
        write(disk, 2)
        assert contents(disk).keys() == before.keys()
        assert contents(disk) != before


@writers
def test_files_with_a_size_limit(tmp_path, writer):
    """Behaves like a quota and needs no privileges, so it runs everywhere."""
    write, name = WRITERS[writer]
    write(tmp_path, 1)
    before = contents(tmp_path)
    with short_files(4096):
        refused(lambda: write(tmp_path, 2), name, LONG)
    assert contents(tmp_path) == before
    write(tmp_path, 2)
    assert contents(tmp_path) != before


@writers
def test_read_only_folders(tmp_path, writer):
    write, name = WRITERS[writer]
    write(tmp_path, 1)
    before = contents(tmp_path)
    with read_only(tmp_path):
        refused(lambda: write(tmp_path, 2), name, f"{FIXED}|not a writable folder")
        refused(lambda: write(tmp_path / "new", 2), name, f"{FIXED}|not a writable folder")
    assert contents(tmp_path) == before


def test_the_result_of_a_cell_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_run", cells._run)  # restored at the end of the test
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "cell").mkdir()
        (disk / "cell" / "last.ckpt").write_bytes(b"to go on from")
        fill(disk, 4096)
        refused(lambda: a_result(disk, 1), "result.json", FULL)
        assert contents(disk) == {"cell/.lock": b"", "cell/last.ckpt": b"to go on from"}
        make_room(disk)
        a_result(disk, 1)
        assert contents(disk).keys() == {"cell/.lock", "cell/result.json"}
        with read_only(disk):
            assert cells.result_of(SimpleNamespace(folder="cell"), disk) == {"history": [1] * 5000}
            refused(lambda: cells.make(SimpleNamespace(folder="cell"), disk), "cell", FIXED)
            refused(lambda: cells.make(SimpleNamespace(folder="other"), disk), "other", FIXED)


# Caches and the data set that is drawn -------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    return ImageFiles(Squares(tmp_path / "squares", train=10, test=3).train(), None)


def in_cache(images, cache):
    found = cache.images(images, 64)
    return [found[row].tobytes() for row in range(len(images.table))]


@pytest.mark.parametrize("left", [0, 4096, 3 * 64 * 64 * 4])
def test_an_image_cache_on_a_full_disk(tmp_path, images, left):
    """Cached images remain, and the others are decoded when there is space."""
    expected = in_cache(images, ImageCache(str(tmp_path / "cache")))
    few = ImageFiles(images.table.select(np.arange(4)), None)
    with small_disk(tmp_path / "disk", "1m") as disk:
        cache = ImageCache(str(disk / "cache"))
        fill(disk, left)
        refused(lambda: in_cache(images, cache), "cache", f"{FULL}|free")
        make_room(disk)
        assert in_cache(few, cache) == expected[:4]
        fill(disk, left)
        refused(lambda: in_cache(images, cache), "cache", f"{FULL}|free")
        assert in_cache(few, cache) == expected[:4]
        make_room(disk)
        assert in_cache(images, cache) == expected


def test_a_read_only_image_cache(tmp_path, images):
    folder = tmp_path / "cache"
    few = ImageFiles(images.table.select(np.arange(4)), None)
    expected = in_cache(few, ImageCache(str(folder)))
    before = contents(folder)
    with read_only(folder):
        assert in_cache(few, ImageCache(str(folder))) == expected  # all images are cached, so nothing is written
        refused(lambda: in_cache(images, ImageCache(str(folder))), "cache", FIXED)
        refused(lambda: in_cache(images, ImageCache(str(folder / "new"))), "cache", FIXED)
    assert contents(folder) == before


@pytest.mark.parametrize("how", ["full", "long", "read-only"])
def test_features_on_a_full_disk(tmp_path, how):
    """Partially written rows of a store are not used as features."""
    keys = [bytes([i]) * 32 for i in range(8)]
    rows = np.random.default_rng(0).random((8, 4096)).astype(np.float16)

    def store(folder):
        return RowStore(folder, (4096,), np.float16, {"kind": "features"}, "features")

    with small_disk(tmp_path / "disk", "1m") as disk:
        store(disk / "f").append(keys[:2], rows[:2])
        if how == "full":
            fill(disk, 3 * 8192)  # three of six
            refused(lambda: store(disk / "f").append(keys[2:], rows[2:]), "rows.bin", FULL)
            make_room(disk)
        elif how == "long":
            with short_files(5 * 8192):
                refused(lambda: store(disk / "f").append(keys[2:], rows[2:]), "rows.bin", LONG)
        else:
            with read_only(disk):
                refused(lambda: store(disk / "f").append(keys[2:], rows[2:]), "f", FIXED)
                refused(lambda: store(disk / "new"), "new", FIXED)
        again = store(disk / "f")
        assert again.find(keys).tolist() == [0, 1, *[-1] * 6]
        assert (again.rows == rows[:2]).all()
        again.append(keys[4:], rows[4:])
        assert (store(disk / "f").rows == rows[[0, 1, 4, 5, 6, 7]]).all()


@pytest.mark.parametrize("left", [0, 32768])
def test_generated_digits_on_a_full_disk(tmp_path, left):
    with small_disk(tmp_path / "disk", "1m") as disk:
        digits = Digits(str(disk / "digits"), num_train=8, num_test=2, image_size=64)
        fill(disk, left)
        refused(digits.prepare, "digits", FULL)
        assert contents(disk) == {}
        make_room(disk)
        digits.prepare()
        with read_only(disk):
            digits.prepare()
            other = Digits(str(disk / "digits"), num_train=9, num_test=2, image_size=64)
            refused(other.prepare, "digits", FIXED)


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory, clip_folder):
    """Returns the command of a run of two epochs with a report."""
    words = words_of(tmp_path_factory.mktemp("words"), clip_folder, "--trainer.max_epochs=2")
    return [word for word in words if word != "--report.enabled=false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, words):
    """Returns the final state of an undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    log = run.parent / "log"
    assert in_a_process(partial(command, [*words, f"--resume={run}"], run), log) == 0, log.read_text()
    return run


def report(run):
    return {name: content for name, content in contents(run).items() if name.endswith((".png", "predictions.csv"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("config.yaml", 1),
        ("split.json", 1),
        ("hparams.yaml", 1),
        ("metrics.csv", 1),
        ("metrics.csv", 4),
        ("last.ckpt", 1),
        ("last.ckpt", 5),
        ("predictions.csv", 1),
        ("predictions.png", 1),
        ("training.png", 1),
    ],
)
def test_a_run_on_a_full_disk(tmp_path, words, whole, name, time):
    """The run stops, cannot be resumed while the disk is full, and has the same final state once there is space."""
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk") as disk:
        run = disk / "run"
        words = [*words, f"--resume={run}"]
        assert in_a_process(filling_at(disk, name, time, partial(typed, words)), log) == 9, log.read_text()
        told(log, name)
        before = contents(disk)
        assert [file for file in before if "/." in file] == ["run/.lock"]  # no temporary file remains
        assert in_a_process(partial(typed, words), log) == 9, log.read_text()
        told(log, "run")
        assert contents(disk) == before
        make_room(disk)
        again = ["fit", f"--resume={run}"] if newest_checkpoint(run) else words
        assert in_a_process(partial(command, again, run), log) == 0, log.read_text()
        assert unlike(left_behind(whole), left_behind(run)) == []
        assert report(whole) == report(run)


@pytest.mark.slow
def test_a_run_in_a_read_only_folder(tmp_path, words, whole):
    """The run is refused before training, and existing files do not change."""
    log, runs = tmp_path / "log", tmp_path / "runs"
    shutil.copytree(whole, runs / "run")
    before = contents(runs)
    with read_only(runs):
        for place in ("run", "new"):
            assert in_a_process(partial(typed, [*words, f"--resume={runs / place}"]), log) == 9, log.read_text()
            told(log, f"runs/{place}", FIXED)
        logger = [f"--trainer.logger.init_args.save_dir={runs}", "--trainer.logger.init_args.name=cbsa"]
        assert in_a_process(partial(typed, [*words, *logger]), log) == 9, log.read_text()
        told(log, "runs/cbsa", FIXED)
    assert contents(runs) == before


@pytest.mark.slow
def test_read_only_images(tmp_path, clip_folder):
    """Nothing is written to the folder of the data."""
    words, log, run = words_of(tmp_path, clip_folder, "--trainer.max_epochs=2"), tmp_path / "log", tmp_path / "run"
    with read_only(tmp_path / "data"):
        assert in_a_process(partial(typed, [*words, f"--resume={run}"]), log) == 0, log.read_text()
    assert newest_checkpoint(run) is not None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predictions_of_the_command(tmp_path, words, whole, suffix):
    log = tmp_path / "log"
    make_table(tmp_path / "data")
    with small_disk(tmp_path / "disk", "1m") as disk:
        output = disk / f"out{suffix}"
        words = ["predict", f"--config={whole / 'config.yaml'}", f"--ckpt_path={newest_checkpoint(whole)}"]
        words += [f"--data.predict={tmp_path / 'data'}", f"--predictions.output={output}"]
        words += [f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]
        assert in_a_process(partial(typed, words), log) == 0, log.read_text()
        expected = contents(disk)
        assert expected.keys() == {output.name, "out_left_out.csv"}
        for name in expected:
            (disk / name).unlink()
        fill(disk)
        assert in_a_process(partial(typed, words), log) == 9, log.read_text()
        told(log, output.name)
        assert contents(disk) == {}
        make_room(disk)
        with read_only(disk):
            assert in_a_process(partial(typed, words), log) == 9, log.read_text()
            assert "not a writable folder" in log.read_text()
        assert in_a_process(partial(typed, words), log) == 0, log.read_text()
        assert contents(disk) == expected
        assert in_a_process(partial(typed, words), log) == 9, log.read_text()
        assert "exists already" in log.read_text()
        assert contents(disk) == expected


@pytest.mark.slow
def test_a_table_on_a_full_disk(tmp_path, clip_folder):
    """The cell resumes from its last checkpoint, which remains."""
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk") as disk:
        words = ["table", "1", f"--data=voc={tiny_voc(tmp_path)}", "--shares=0.2", "--rows=Ours"]
        words += [f"--config={short(tmp_path, 2)}", f"--clip={clip_folder}", f"--configs={CONFIGS}", f"--out={disk}"]
        assert in_a_process(filling_at(disk, "result.json", 1, partial(typed, words)), log) == 9, log.read_text()
        told(log, "table_1.md")
        (last,) = disk.glob("*/last.ckpt")
        assert read_checkpoint(last)["epoch"] == 1
        make_room(disk)
        assert in_a_process(partial(typed, words), log) == 0, log.read_text()
        assert len(list(disk.glob("*/result.json"))) == 1
        assert (disk / "table_1.md").is_file()
