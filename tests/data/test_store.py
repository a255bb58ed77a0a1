"""RowStore: rows are exact even with concurrent writers and crashes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from cbsa_lightning.data.caches import store as module
from cbsa_lightning.data.caches.store import KEY_BYTES, RowStore, content_keys
from cbsa_lightning.errors import ConfigError, DataError

SHAPE = (3, 5)
RECORD_BYTES = KEY_BYTES + 4


def open_store(folder, shape=SHAPE, dtype=np.float32, **settings):
    return RowStore(folder, shape, dtype, {"size": 224, **settings}, "features")


def key(number):
    return blake2b(str(number).encode(), digest_size=KEY_BYTES).digest()


def row(number, shape=SHAPE):
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def keys(numbers):
    return [key(number) for number in numbers]


def rows(numbers):
    return np.stack([row(number) for number in numbers])


def put(store, numbers):
    store.append(keys(numbers), rows(numbers))


def require_sound(store, numbers):
    """Checks that rows are exact and not repeated. Returns the numbers found."""
    places = store.find(keys(numbers))
    found = [(number, place) for number, place in zip(numbers, places, strict=True) if place >= 0]
    for number, place in found:
        np.testing.assert_array_equal(store[place], row(number))
    assert len({place for _, place in found}) == len(found)
    assert len(store.rows) == len(store) >= len(found)
    return [number for number, _ in found]


def test_rows_are_found_by_their_keys(tmp_path):
    store = open_store(tmp_path / "deep" / "store")
    assert len(store) == 0
    assert store.rows.shape == (0, *SHAPE)
    assert store.row_bytes == 60
    put(store, [3, 1, 2])
    put(store, [7])
    for one in (store, open_store(tmp_path / "deep" / "store")):
        places = one.find(keys([7, 9, 3, 3, 2]))
        assert places.dtype == np.int64
        assert places.tolist() == [3, -1, 0, 0, 2]
        np.testing.assert_array_equal(one.rows, rows([3, 1, 2, 7]))
        assert not one.rows.flags.writeable
        assert not one[2].flags.writeable
        for outside in (4, -1):  # unlike in an array, -1 is not the last row: find() returns it for a missing key
            with pytest.raises(IndexError):
                one[outside]
    assert store.find([]).tolist() == []


def test_a_key_keeps_its_first_row(tmp_path):
    store = open_store(tmp_path)
    store.append([key(1), key(2), key(1)], rows([1, 2, 5]))
    store.append(keys([2, 3]), rows([6, 3]))
    store.append(keys([1, 2]), rows([7, 8]))
    store.append([], rows([1])[:0])
    assert require_sound(open_store(tmp_path), [1, 2, 3]) == [1, 2, 3]
    assert len(store) == 3


def test_refresh_makes_rows_of_other_processes_visible(tmp_path):
    one, other = open_store(tmp_path), open_store(tmp_path)
    put(one, [1])
    view = one.rows
    put(other, [2])  # refreshes by itself
    assert other.find(keys([1, 2])).tolist() == [0, 1]
    assert one.find(keys([1, 2])).tolist() == [0, -1]
    one.refresh()
    assert require_sound(one, [1, 2]) == [1, 2]
    np.testing.assert_array_equal(view[0], row(1))  # the old memory map is still valid


def test_rows_and_keys_of_the_wrong_form_are_refused(tmp_path):
    store = open_store(tmp_path)
    for wrong in (rows([1, 2]), rows([1]).astype(np.float64), rows([1])[:, :2]):
        with pytest.raises(DataError, match=r"1 features must be given as float32 of shape \(1, 3, 5\), found"):
            store.append([key(1)], wrong)
    with pytest.raises(DataError, match="keys must have 32 bytes, found 3"):
        store.append([b"abc"], rows([1]))
    assert len(store) == 0


def test_different_settings_are_named(tmp_path):
    put(open_store(tmp_path, names=("a", "b")), [1])
    assert len(open_store(tmp_path, names=["a", "b"])) == 1
    with pytest.raises(
        ConfigError, match=r"features were created with size 224 \(requested: 448\); choose another fold"
    ):
        open_store(tmp_path, names=["a", "b"], size=448)
    with pytest.raises(ConfigError, match=r"names \['a', 'b'\] \(requested: None\)"):
        open_store(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype '<f4' \(requested: '<f2'\)"):
        open_store(tmp_path, dtype=np.float16, names=("a", "b"))
    with pytest.raises(ConfigError, match=r"shape \[3, 5\] \(requested: \[3, 4\]\)"):
        open_store(tmp_path, shape=(3, 4), names=("a", "b"))
    (tmp_path / "settings.json").write_text('{"size": 2')
    with pytest.raises(ConfigError, match=r"settings\.json: the file is damaged .*delete the folder"):
        open_store(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match="is missing, but the folder contains features"):
        open_store(tmp_path)


def test_room_is_checked(tmp_path, monkeypatch):
    store = open_store(tmp_path, shape=(250_000,))  # 1 MB per row
    store.append([key(0)], np.zeros((1, 250_000), np.float32))
    store.require_room(99, 0.1, "")
    with pytest.raises(
        ConfigError, match=r"2100 more features need 2\.1 GB, 2\.1 GB with the existing .* 2 GB are allowed\. D"
    ):
        store.require_room(2100, 2, "Do something.")
    with pytest.raises(ConfigError, match=r"0\.1 GB are allowed"):
        store.require_room(100, 0.1, "")
    with pytest.raises(ConfigError, match="nan GB are allowed"):
        store.require_room(1, float("nan"), "")
    store.require_room(0, 0, "")  # no new rows: reading is allowed even above the limit
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10**9))
    store.require_room(1000, 5, "")
    with pytest.raises(ConfigError, match=r"1001 .*need 1\.0 GB; the disk has 1\.0 GB free\. Do something"):
        store.require_room(1001, 5, "Do something.")


# Damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.bin", "rows.bin"])
def test_a_torn_tail_loses_only_the_torn_rows(tmp_path, name):
    numbers, rng = list(range(12)), np.random.default_rng(0)
    whole = tmp_path / "whole"
    put(open_store(whole), numbers[:7])
    put(open_store(whole), numbers[7:])
    unit = RECORD_BYTES if name == "index.bin" else 60
    size = (whole / name).stat().st_size
    assert size == unit * len(numbers)
    for i, length in enumerate([0, size - 1, unit, *rng.integers(0, size, 25).tolist()]):
        torn = shutil.copytree(whole, tmp_path / f"torn-{i}")
        os.truncate(torn / name, length)
        store = open_store(torn)
        assert require_sound(store, numbers) == numbers[: length // unit]
        put(store, [100, 101])  # fewer than were lost
        assert require_sound(open_store(torn), [*numbers, 100, 101]) == [*numbers[: length // unit], 100, 101]
        put(open_store(torn), numbers)
        assert require_sound(open_store(torn), [*numbers, 100, 101]) == [*numbers, 100, 101]


@pytest.mark.parametrize("tail", [bytes(RECORD_BYTES * 3), b"x" * 50, bytes(range(90))])
def test_data_after_the_last_record_is_ignored(tmp_path, tail):
    put(open_store(tmp_path), [1, 2])
    for name in ("index.bin", "rows.bin"):
        with (tmp_path / name).open("ab") as file:
            file.write(tail * 3)
    store = open_store(tmp_path)
    assert len(store) == 2
    put(store, [3])
    assert require_sound(open_store(tmp_path), [1, 2, 3]) == [1, 2, 3]
    assert (tmp_path / "index.bin").stat().st_size == 3 * RECORD_BYTES
    assert (tmp_path / "rows.bin").stat().st_size == 3 * 60


def test_misplaced_records_are_ignored(tmp_path):
    put(open_store(tmp_path), [1, 2])
    content = (tmp_path / "index.bin").read_bytes()
    (tmp_path / "index.bin").write_bytes(content[RECORD_BYTES:] + content[:RECORD_BYTES])
    assert len(open_store(tmp_path)) == 0


def test_files_truncated_while_in_use_are_an_error(tmp_path):
    store = open_store(tmp_path)
    put(store, [1, 2])
    copy = pickle.loads(pickle.dumps(store))
    os.truncate(tmp_path / "rows.bin", 60)
    for action in (store.refresh, lambda: put(store, [3]), lambda: copy[0]):
        with pytest.raises(ConfigError, match="truncated or removed while in use"):
            action()


# Processes ---------------------------------------------------------------------------------------------------------


def append_in_turn(folder, numbers, chunk):
    store = open_store(folder)
    for start in range(0, len(numbers), chunk):
        put(store, numbers[start : start + chunk])
    return len(require_sound(store, numbers)) == len(numbers)


def test_two_processes_append_equal_and_different_rows(tmp_path):
    first, second = list(range(150)), [*range(100, 50, -1), *range(150, 250)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(append_in_turn, tmp_path, numbers, 7) for numbers in (first, second)]
        watcher, seen = open_store(tmp_path), 0
        while not all(task.done() for task in tasks):  # a concurrent reader never sees an incomplete row
            watcher.refresh()
            require_sound(watcher, list(range(0, 250, 10)))
            assert len(watcher) >= seen
            seen = len(watcher)
        assert all(task.result() for task in tasks)
    store = open_store(tmp_path)
    assert require_sound(store, range(250)) == list(range(250))
    assert len(store) == 250
    assert (tmp_path / "rows.bin").stat().st_size == 250 * 60


def look(store, numbers):
    return [(int(place), store[place].tolist()) for place in store.find(keys(numbers))], len(store)


def look_by_row(store, place):
    value = store[place].tolist()
    return value, len(store), len(store._keys)


def test_workers_receive_a_few_bytes_and_map_the_file(tmp_path):
    store = open_store(tmp_path)
    put(store, list(range(500)))
    assert store.rows[499].tolist() == row(499).tolist()
    assert len(pickle.dumps(store)) < 1000
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, length = pool.submit(look, store, [7, 499]).result()
        by_row = pool.submit(look_by_row, store, 12).result()
    assert found == [(7, row(7).tolist()), (499, row(499).tolist())]
    assert length == 500
    assert by_row == (row(12).tolist(), 500, 0), "a row is read without the index"


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_store import open_store, put
store = open_store({folder!r})
print("ready", flush=True)
for start in range(0, 10**6, 5):
    put(store, list(range(start, start + 5)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_writer_leaves_complete_rows_and_no_lock(tmp_path):
    numbers = list(range(2000))
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    for delay in (0.0, 0.013, 0.05):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert writer.stdout.readline().strip() == b"ready"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = open_store(tmp_path)
        before = require_sound(store, numbers)
        assert before == numbers[: len(store)]
    put(store, [10**6])
    assert require_sound(open_store(tmp_path), [*numbers, 10**6]) == [*before, 10**6]


class Killed(BaseException):
    pass


def test_a_writer_that_stops_between_any_two_steps(tmp_path, monkeypatch):
    """Stops at every point between the writes of an append, and halfway through each write."""
    write = module._write
    for steps in range(4):
        for half in (False, True):
            folder, left = tmp_path / f"{steps}-{half}", [steps]
            put(open_store(folder), [1, 2])

            def stops(file, start, content, left=left, half=half):
                if left[0] == 0:
                    if half:
                        write(file, start, bytes(content)[: len(bytes(content)) // 2])
                    raise Killed
                left[0] -= 1
                write(file, start, content)

            monkeypatch.setattr(module, "_write", stops)
            try:
                put(open_store(folder), [3, 4, 5])
                finished = True
            except Killed:
                finished = False
            monkeypatch.setattr(module, "_write", write)
            assert finished is (steps == 3)
            found = require_sound(open_store(folder), [1, 2, 3, 4, 5])
            assert found == ([1, 2, 3, 4, 5] if finished else [1, 2, 3] if (steps, half) == (2, True) else [1, 2])
            put(open_store(folder), [6, 3])
            assert require_sound(open_store(folder), [1, 2, 3, 6]) == [1, 2, 3, 6]


def test_many_keys_are_fast(tmp_path):
    store = open_store(tmp_path, shape=(1,))
    many = [i.to_bytes(KEY_BYTES, "little") for i in range(200_000)]
    store.append(many, np.arange(200_000, dtype=np.float32)[:, None])
    start = time.perf_counter()
    again = open_store(tmp_path, shape=(1,))
    assert (again.find(many) == np.arange(200_000)).all()
    assert time.perf_counter() - start < 5  # about 0.4 s on an idle machine


# Keys of contents --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Returns files whose times are old enough to be reliable with the fixture ``later``."""
    paths = [tmp_path / f"{name}.jpg" for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    return paths


@pytest.fixture
def later(monkeypatch):
    """Shifts the clock, as if files had been written ten seconds ago."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10_000_000_000)


def digest(path):
    return blake2b(path.read_bytes(), digest_size=32).digest()


def count_reads(monkeypatch):
    read, original = [], module._hash
    monkeypatch.setattr(module, "_hash", lambda path: read.append(Path(path).name) or original(path))
    return read


def test_keys_are_hashes_of_the_contents(tmp_path, files, later, monkeypatch):
    read = count_reads(monkeypatch)
    memo = tmp_path / "deep" / "memo.json"
    asked = [files[1], files[0], files[1]]
    assert content_keys(asked, memo) == [digest(path) for path in asked]
    assert sorted(read) == ["a.jpg", "b.jpg"]
    assert content_keys(files, memo) == [digest(path) for path in files]
    assert sorted(read) == ["a.jpg", "b.jpg", "c.jpg"], "unchanged files are not read again"
    monkeypatch.chdir(tmp_path)
    assert content_keys([Path("a.jpg")], memo) == [digest(files[0])]
    assert len(read) == 3
    assert content_keys([], memo) == []
    assert sorted(p.name for p in memo.parent.iterdir()) == ["memo.json"], "no temporary file is left"


def test_a_changed_file_has_a_new_key_and_a_touched_one_its_old(tmp_path, files, later, monkeypatch):
    memo = tmp_path / "memo.json"
    before = content_keys(files, memo)
    read = count_reads(monkeypatch)
    time.sleep(0.02)  # longer than the resolution of the file system's clock
    files[0].write_bytes(b"A" * files[0].stat().st_size)  # same size, other times
    os.utime(files[1])
    after = content_keys(files, memo)
    assert read == ["a.jpg", "b.jpg"]
    assert after[0] == digest(files[0]) != before[0]
    assert after[1:] == before[1:]

    status = files[2].stat()
    files[2].write_bytes(b"C" * status.st_size)
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns))  # even with its old time, as after copying
    assert content_keys(files, memo)[2] == digest(files[2]) != before[2]


def test_a_file_just_written_is_read_again(tmp_path, files, monkeypatch):
    memo = tmp_path / "memo.json"
    content_keys(files, memo)
    read = count_reads(monkeypatch)
    content_keys(files, memo)
    assert read == ["a.jpg", "b.jpg", "c.jpg"], "a change within the clock's resolution does not change their times"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": 1}', b'{"a": [1, 2, 3, "xx"]}', b'{"a": [1, 2, 3, "00"]}', b"\xff\xfe"]
)
def test_a_damaged_memo_is_recreated(tmp_path, files, later, content):
    memo = tmp_path / "memo.json"
    memo.write_bytes(content)
    assert content_keys(files, memo) == [digest(path) for path in files]
    assert set(json.loads(memo.read_text())) == {str(path) for path in files}


def test_unreadable_files_are_named(tmp_path, files):
    with pytest.raises(DataError, match=r"none\.jpg: No such file .*check the image root"):
        content_keys([*files, tmp_path / "none.jpg"], tmp_path / "memo.json")
    with pytest.raises(DataError, match="is a folder"):
        content_keys([tmp_path], tmp_path / "memo.json")
