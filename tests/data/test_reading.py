"""All readers refuse special files, unreadable files and files larger than memory, and never block."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.store import content_keys
from cbsa_lightning.data.class_names import read_class_file
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.readers import NUSWIDE, VOC, Table
from cbsa_lightning.data.readers.coco import COCO, read_coco
from cbsa_lightning.data.readers.table import read_table
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import DataError
from cbsa_lightning.io import reading
from cbsa_lightning.io.reading import brief, open_regular, read_text

TABLE = AnnotationTable(Path("x"), np.array(["a.jpg"], np.dtypes.StringDType()), np.zeros((1, 1), np.int8), ("cat",))
READERS = {
    "image": decode,
    "hash": lambda path: content_keys([path], path.parent / "memo.json"),
    "coco": lambda path: read_coco(path, path.parent),
    "coco names": lambda path: COCO(str(path.parent), train_annotations=path.name).class_names,
    "voc": lambda path: VOC(str(path.parents[4])).train(),
    "nuswide list": lambda path: NUSWIDE(str(path.parent), layout="list", train_images=path.name).train(),
    "csv": read_table,
    "parquet": read_table,
    "class file": read_class_file,
    "json class file": read_class_file,
    "split": lambda path: Split.load(path, TABLE),
    "list to predict": lambda path: read_images(path, ["cat"]),
    "table to predict": lambda path: read_images(path, ["cat"]),
}
NAMES = {
    "image": "a.png", "hash": "a.png", "coco": "i.json", "coco names": "i.json", "nuswide list": "images.npy",
    "voc": "VOCdevkit/VOC2012/ImageSets/Main/aeroplane_train.txt", "csv": "t.csv", "parquet": "t.parquet",
    "class file": "c.yaml", "json class file": "c.json", "split": "split.json", "list to predict": "l.txt",
    "table to predict": "l.csv",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_time():
    """Limits the time of a test, since opening a named pipe normally blocks forever."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """Returns a reader and the path of its file; other files that it needs do not exist."""
    path = tmp_path / NAMES[request.param]
    path.parent.mkdir(parents=True, exist_ok=True)
    return READERS[request.param], path


def refused(read, path, message):
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_named_pipe_is_refused_at_once(reader):
    read, path = reader
    os.mkfifo(path)
    refused(read, path, "is a named pipe, not a file; correct the path")


def test_an_endless_device_is_refused(reader):
    read, path = reader
    path.symlink_to("/dev/zero")
    refused(read, path, "is a device, not a file; correct the path")


def test_a_folder_is_refused(reader):
    read, path = reader
    path.mkdir()
    refused(read, path, "is a folder, not a file|no image in this folder or its subfolders")


def test_a_link_to_itself_is_refused(reader):
    read, path = reader
    path.symlink_to(path)
    refused(read, path, "(?i)symbolic links")


def test_a_file_without_permission_is_named(reader, monkeypatch):
    """Simulates the system's error, since the superuser may read all files."""
    read, path = reader
    path.write_bytes(b"content")

    def forbid(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reading.os, "open", forbid)
    refused(read, path, "Permission denied")


def test_a_socket_is_refused(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises((DataError, OSError)):  # the system does not open it
            open_regular(path)
    refused(read_table, path, "cannot be read as a table")


@pytest.mark.parametrize("name", ["a\0b.jpg", "x" * 5000])
def test_names_that_no_file_can_have(tmp_path, name):
    for read in (decode, read_table, read_class_file, lambda path: read_images(path, ["cat"])):
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert "a\\x00b" in str(error.value) or "File name too long" in str(error.value)
    with pytest.raises(DataError, match="no file at"):
        Table(str(tmp_path / name)).prepare()
    for source in (COCO(str(tmp_path / name)), VOC(str(tmp_path / name)), NUSWIDE(str(tmp_path / name))):
        with pytest.raises(DataError, match="is not complete under"):
            source.prepare()


def test_an_image_whose_name_is_not_utf8_is_decoded(tmp_path):
    from layouts import write_image

    write_image(tmp_path / "a.png")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    (tmp_path / "a.png").rename(path)
    assert decode(path).shape == (32, 40, 3)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"caf.*is empty"):
        decode(path)


@pytest.mark.parametrize("name", ["i.json", "split.json", "c.yaml", "c.json", "l.txt", "t.csv"])
def test_a_file_larger_than_memory_is_refused_before_reading(tmp_path, name):
    """A sparse file of ten terabytes."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(10**13)
    read = {
        "i.json": READERS["coco"],
        "split.json": READERS["split"],
        "l.txt": READERS["list to predict"],
        "t.csv": read_table,
    }
    refused(read.get(name, read_class_file), path, "memory|but at most")
    if name == "i.json":
        refused(READERS["coco names"], path, "10,000.0 GB.*memory")


def test_the_largest_real_files_are_read(tmp_path, monkeypatch):
    """Like COCO's 330 MB on a machine with two gigabytes: memory of twice the file size is enough."""
    path = tmp_path / "a.txt"
    path.write_text("content")
    monkeypatch.setattr(reading, "memory_of_machine", lambda: 14)
    assert read_text(path) == "content"
    monkeypatch.setattr(reading, "memory_of_machine", lambda: 13)
    with pytest.raises(DataError, match="needs twice as much"):
        read_text(path)


def test_messages_are_short():
    assert brief("a\nb") == "'a\\nb'"
    assert brief("x" * 10**6) == f"'{'x' * 199}... (1,000,000 characters)"
