"""Images in Arrow files: the same tables, images, caches and runs as with image files, and errors that name the row."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cbsa_lightning import __main__ as cli
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.caches.store import content_keys
from cbsa_lightning.data.image_check import unreadable
from cbsa_lightning.data.images import ImageFiles, decode
from cbsa_lightning.data.readers import Table
from cbsa_lightning.data.readers.columns import read_columns
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.labels.image_sizes import upright_sizes
from layouts import write_arrow, write_image, write_rows, write_shards
from tiny_data import CLASSES, Squares, differences, tiny_data, tiny_fit

LABELS = [["cat", "dog"], [], None, ["dog"], ["cat"], None, ["zebra"], [], ["dog"], None]
NAMES = [f"photos/{i}.png" for i in range(10)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Ten image files."""
    for i, name in enumerate(NAMES):
        write_image(tmp_path / name, i, size=(40 + i, 32))
    return [tmp_path / name for name in NAMES]


@pytest.fixture
def contents(files: list[Path]) -> list[bytes]:
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("lists", [True, False], ids=["lists", "cells"])
def test_shards_equal_a_table_of_files(tmp_path, files, contents, form, lists):
    cells = LABELS if lists else [None if row is None else ";".join(row) or "none" for row in LABELS]
    write_shards(tmp_path, "train", contents, cells, NAMES, form=form)
    source = Table(str(tmp_path / "train-*.arrow"))
    source.prepare()
    table = source.train()
    assert source.class_names == ("cat", "dog", "zebra")
    expected = [[-1] * 3 if row is None else [name in row for name in source.class_names] for row in LABELS]
    assert table.labels.tolist() == np.array(expected, int).tolist()
    assert table.paths.tolist() == [f"train-{i // 4}.arrow/{name}" for i, name in enumerate(NAMES)]
    assert table.missing_files() == []
    assert not len(unreadable(table, np.arange(10)))
    images = ImageFiles(table)
    assert all((images[i] == decode(file)).all() for i, file in enumerate(files))
    assert upright_sizes([table.file(i) for i in range(10)]) == [(40 + i, 32) for i in range(10)]
    assert "10 images in column 'image'" in source.describe()[0]


def test_images_without_names_are_named_after_their_rows(tmp_path, files, contents):
    write_arrow(tmp_path / "a.arrow", pa.table({"jpg": contents[:4], "tags": ["cat", "dog", None, "cat"]}))
    table = Table(str(tmp_path / "a.arrow"), image_column="jpg").train()
    assert table.paths.tolist() == [f"a.arrow/{i}" for i in range(4)]
    assert (decode(table.file(3)) == decode(files[3])).all()
    write_shards(tmp_path, "some", contents[:3], LABELS[:3], ["x.png", None, "y.png"])
    table = Table(str(tmp_path / "some-0.arrow")).train()
    assert table.paths.tolist() == ["some-0.arrow/x.png", "some-0.arrow/1", "some-0.arrow/y.png"]
    assert (decode(table.file(1)) == decode(files[1])).all()


def test_other_tables_may_name_images_in_shards(tmp_path, files, contents):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    write_rows(tmp_path / "labels.csv", ["image", "labels"], [["train-1.arrow/photos/5.png", "cat"], [NAMES[0], "dog"]])
    table = Table(str(tmp_path / "labels.csv")).train()
    assert table.missing_files() == []
    assert (decode(table.file(0)) == decode(files[5])).all()
    assert read_images(tmp_path / "train-1.arrow", ("cat",)).paths.tolist()[1] == "train-1.arrow/photos/5.png"


def test_a_name_that_is_not_in_its_shard_is_missing(tmp_path, contents):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    write_rows(tmp_path / "labels.csv", ["image", "labels"], [["train-1.arrow/photos/0.png", "cat"]])
    table = Table(str(tmp_path / "labels.csv")).train()
    assert table.missing_files() == ["train-1.arrow/photos/0.png (row 0)"]
    with pytest.raises(DataError, match=r"train-1.arrow/photos/0.png: the file does not exist"):
        decode(table.file(0))


def test_a_folder_may_be_called_like_a_shard(tmp_path):
    write_image(tmp_path / "photos.arrow" / "a.png")
    assert decode(tmp_path / "photos.arrow" / "a.png").shape == (32, 40, 3)


def _refused(tmp_path: Path, *words: str, pattern: str = "train-*.arrow", **options: object) -> None:
    with pytest.raises(DataError) as error:
        Table(str(tmp_path / pattern), **options).train()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_damaged_shard(tmp_path, contents):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    shard = tmp_path / "train-1.arrow"
    shard.write_bytes(shard.read_bytes()[:-500])
    _refused(tmp_path, "train-1.arrow", "cannot be read as an Arrow file", "write the shard again")
    shard.write_bytes(b"image,labels\n")
    _refused(tmp_path, "train-1.arrow", "cannot be read as an Arrow file")
    table = pa.table({"image": contents[:1], "labels": [["cat"]]})
    write_arrow(shard, table.replace_schema_metadata({"huggingface": "{"}))
    _refused(tmp_path, "train-1.arrow: the metadata of Hugging Face datasets is damaged", pattern="train-1.arrow")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"labels": ["cat"]}, ["expected one column of images, found none", "'labels' (string)"]),
        ({"image": [b"x"], "mask": [b"x"], "labels": ["cat"]}, ["'image', 'mask'"]),
        ({"image": ["a.jpg"], "labels": ["cat"]}, ["found none", "Write the content of the image files"]),
        ({"image": [{"bytes": b"x", "path": [1]}], "labels": ["cat"]}, ["paths in column 'image' are not text"]),
    ],
)
def test_a_shard_has_one_column_of_images_and_paths_are_text(tmp_path, columns, words):
    write_arrow(tmp_path / "train-0.arrow", pa.table(columns))
    _refused(tmp_path, "train-0.arrow", *words)


def test_compressed_shard(tmp_path):
    table = pa.table({"image": [bytes(5000)] * 3, "labels": ["cat"] * 3})
    write_arrow(tmp_path / "train-0.arrow", table, compression="zstd")
    _refused(tmp_path, "train-0.arrow: the shard is compressed; write it without compression")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("photos/4.png", ["train-1.arrow: rows 1 and 2 have the same path 'photos/4.png'"]),
        ("/photos/5.png", ["train-1.arrow, row 2: the path '/photos/5.png'", "not a relative path"]),
        ("../5.png", ["train-1.arrow, row 2", "not a relative path"]),
        ("", ["train-1.arrow, row 2", "not a relative path"]),
    ],
)
def test_names_that_cannot_be_paths(tmp_path, contents, name, words):
    write_shards(tmp_path, "train", contents, LABELS, [*NAMES[:5], name, *NAMES[6:]])
    _refused(tmp_path, *words)


def test_shards_with_different_columns(tmp_path, contents):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    write_arrow(tmp_path / "train-1.arrow", pa.table({"image": contents[:1], "tags": ["cat"]}))
    _refused(tmp_path, "train-1.arrow: the columns", "train-0.arrow; write all shards with the same columns")


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "single"])
def test_numbers_of_hugging_face_classes(tmp_path, contents, lists):
    kind = {"_type": "ClassLabel", "names": ["dog", "cat"]}
    features = {"image": {"_type": "Image"}, "labels": {"feature": kind, "_type": "Sequence"} if lists else kind}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    cells = [[1], [0, 1], [], None] if lists else [1, 0, -1, None]
    table = pa.table({"image": contents[:4], "labels": cells}).replace_schema_metadata(metadata)
    write_arrow(tmp_path / "train-0.arrow", table)
    source = Table(str(tmp_path / "train-0.arrow"))
    assert source.class_names == ("cat", "dog")
    expected = [[1, 0], [1, 1], [0, 0], [-1, -1]] if lists else [[1, 0], [0, 1], [-1, -1], [-1, -1]]
    assert source.train().labels.tolist() == expected
    wrong = pa.table({"image": contents[:1], "labels": [[2]] if lists else [2]}).replace_schema_metadata(metadata)
    write_arrow(tmp_path / "train-1.arrow", wrong)
    _refused(tmp_path, "train-1.arrow: column 'labels' contains 2", "the numbers 0 to 1; correct the labels")


def test_labels_name_the_row_of_the_shard(tmp_path, contents):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    (tmp_path / "classes.yaml").write_text("cat:\ndog:\n")
    _refused(tmp_path, "row 3 of train-1.arrow: 'zebra'", class_file=str(tmp_path / "classes.yaml"))
    columns = {"image": contents[:2], "cat": [1, 7]}
    write_arrow(tmp_path / "test-0.arrow", pa.table({"image": contents[:2], "cat": [1, 0]}))
    write_arrow(tmp_path / "test-1.arrow", pa.table(columns))
    _refused(tmp_path, "'7' (row 2 of test-1.arrow)", pattern="test-*.arrow")


def test_rows_at_the_boundaries_of_shards(tmp_path):
    table = pa.table({"image": pa.array([b"a", b"b"]), "labels": ["cat", "dog"]})
    for name, rows in (("a", 2), ("b", 0), ("c", 1)):
        write_arrow(tmp_path / f"{name}.arrow", table.slice(0, rows))
    columns = read_columns(tmp_path / "*.arrow")
    assert [columns.row(i) for i in range(3)] == ["row 1 of a.arrow", "row 2 of a.arrow", "row 1 of c.arrow"]


def test_pattern_without_files(tmp_path):
    with pytest.raises(DataError, match=re.escape("none-*.arrow (train)")):
        Table(str(tmp_path / "none-*.arrow")).prepare()
    _refused(tmp_path, "no file matches this pattern", pattern="none-*.arrow")


def test_unreadable_images_are_named(tmp_path, contents):
    broken = [*contents[:5], b"not an image", None, contents[7][:-40], *contents[8:]]
    write_shards(tmp_path, "train", broken, LABELS, NAMES)
    table = Table(str(tmp_path / "train-*.arrow")).train()
    assert table.missing_files() == []
    assert unreadable(table, np.arange(10)).tolist() == [5, 6, 7]
    with pytest.raises(DataError, match=r"train-1.arrow/photos/5.png: cannot be read as an image"):
        decode(table.file(5))
    with pytest.raises(DataError, match=r"train-1.arrow, row 3: column 'image' contains no bytes"):
        decode(table.file(6))


def test_cache_keys_depend_on_the_content_of_the_image(tmp_path, files, contents):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    table = Table(str(tmp_path / "train-*.arrow")).train()
    paths = [table.file(i) for i in range(10)]
    assert content_keys(paths, tmp_path / "memo.json") == content_keys(files, tmp_path / "other.json")
    cache = ImageCache(str(tmp_path / "cache"))
    assert (cache.images(ImageFiles(table), 24)[9] == cache.images(ImageFiles(table), 24)[9]).all()
    before = content_keys(paths, tmp_path / "memo.json")
    write_shards(tmp_path / "new", "train", [contents[9], *contents[1:]], LABELS, NAMES)
    os.replace(tmp_path / "new" / "train-0.arrow", tmp_path / "train-0.arrow")
    os.utime(tmp_path / "train-0.arrow", (1, 1))
    after = content_keys(paths, tmp_path / "memo.json")
    assert after[0] == before[9]
    assert after[1:] == before[1:]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_mapped_shards(tmp_path, contents, start):
    write_shards(tmp_path, "train", contents, LABELS, NAMES)
    table = Table(str(tmp_path / "train-*.arrow")).train()
    paths = [table.file(i) for i in range(10)]
    here = [decode(path) for path in paths]  # maps the shards before the workers start
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert all((a == b).all() for a, b in zip(here, pool.map(decode, paths), strict=True))


def _sharded(folder: Path, squares: Squares) -> Table:
    """Returns the images and labels of a source in shards."""
    for part, table in (("train", squares.train()), ("test", squares.test())):
        images = [table.file(i).read_bytes() for i in range(len(table))]
        labels = [[name for name, present in zip(CLASSES, row, strict=True) if present] for row in table.labels]
        write_shards(folder, part, images, labels, [Path(path).name for path in table.paths.tolist()], per_shard=5)
    (folder / "classes.yaml").write_text("".join(f"{name}:\n" for name in CLASSES))
    return Table(str(folder / "train-*.arrow"), str(folder / "test-*.arrow"), class_file=str(folder / "classes.yaml"))


def test_a_run_equals_that_with_image_files(tmp_path, squares_folder, clip_folder):
    squares = Squares(squares_folder)
    source = _sharded(tmp_path / "shards", squares)
    one, _ = tiny_fit(tmp_path / "a", clip_folder, squares)
    other, _ = tiny_fit(tmp_path / "b", clip_folder, source, data={"num_workers": 1})
    assert not differences(one.state_dict(), other.state_dict())


def test_loader_with_an_image_cache(tmp_path, squares_folder):
    squares = Squares(squares_folder)
    source = _sharded(tmp_path / "shards", squares)
    found = []
    for given in (squares, source):
        data = tiny_data(given, image_cache=ImageCache(str(tmp_path / "cache")), num_workers=1)
        data.setup("fit")
        found.append([batch.images for batch in data.val_dataloader()])
    assert all((a == b).all() for a, b in zip(*found, strict=True))


def test_cbsa_check(tmp_path, contents, capsys):
    write_shards(tmp_path, "train", [*contents[:9], b"not an image"], LABELS, NAMES)
    write_shards(tmp_path, "test", contents[:4], LABELS[:4], NAMES[:4])
    command = ["check", "--json", str(tmp_path / "train-*.arrow"), "--test", str(tmp_path / "test-*.arrow")]
    with pytest.raises(SystemExit):
        cli.main(command)
    errors = {error["kind"]: error for error in json.loads(capsys.readouterr().out)["errors"]}
    assert errors["unreadable"]["items"][0]["names"] == [str(tmp_path / "train-2.arrow/photos/9.png")]
    assert errors["leak"]["count"] == 4
