"""Compares FiftyOne's labels.json, written by its exporter, with an expected matrix, and tests errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cbsa_lightning.data.readers import FiftyOne
from cbsa_lightning.errors import DataError

FILE = Path(__file__).parent / "labeltools" / "fiftyone" / "labels.json"


def matrix(table) -> dict[str, list[int]]:
    return dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))


def dataset(folder, content, images=("a.jpg", "b/c.png")) -> str:
    for name in images:
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).touch()
    (folder / "labels.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / "labels.json")


def test_file_of_the_exporter(tmp_path):
    shutil.copy(FILE, tmp_path)
    dataset(tmp_path, FILE.read_text(), ["beach/001.jpg", "beach/002.jpg", "city/003.jpg", "city/004.jpg"])
    source = FiftyOne(str(tmp_path / "labels.json"))
    source.prepare()
    assert source.class_names == ("car", "dog", "person", "tree")
    assert matrix(source.train()) == {  # null means "not labeled" or "none", so it must be unlabeled
        "beach/001.jpg": [0, 1, 1, 0],
        "beach/002.jpg": [-1, -1, -1, -1],
        "city/003.jpg": [-1, -1, -1, -1],
    }
    assert source.train().missing_files() == []
    assert [note.partition("labels.json: ")[2] for note in source.describe()] == [
        "2 images without a label (null): unlabeled",
        "2 labels with a confidence or attributes: not read",
        f"1 image below {tmp_path / 'data'} without a key: omitted",
    ]


def test_forms_of_a_label(tmp_path):
    content = {"classes": ["x", "y"], "labels": {"a": [], "b/c": {"label": 1}}}
    assert matrix(FiftyOne(dataset(tmp_path, content)).train()) == {"a.jpg": [0, 0], "b/c.png": [0, 1]}
    content = {"classes": None, "labels": {"a": "y", "b/c": [{"label": "x"}, {"label": "y"}]}}
    assert matrix(FiftyOne(dataset(tmp_path, content)).train()) == {"a.jpg": [0, 1], "b/c.png": [1, 1]}


@pytest.mark.parametrize(("content", "images", "words"), [
    ("[", (), ["cannot be read as JSON"]),
    ([], (), ["a dataset must be an object"]),
    ({}, (), ["the key 'labels' is missing"]),
    ({"labels": {}}, (), ["labels is empty"]),
    ({"classes": ["x", 3], "labels": {"a": []}}, (), ["a class must be a string, found 3"]),
    ({"classes": ["x"], "labels": {"a": [1]}}, (), ["'a': label 1 is not an index of classes"]),
    ({"classes": ["x"], "labels": {"a": [-1]}}, (), ["label -1 is not an index"]),
    ({"classes": ["x"], "labels": {"a": [True]}}, (), ["a label must be an integer or a string, found True"]),
    ({"classes": ["x"], "labels": {"a": ["y"]}}, (), ["'a': labels that are not in the class list: 'y'"]),
    ({"classes": ["x"], "labels": {"a": [{"label": 0, "bounding_box": []}]}}, (), ["has 'bounding_box'"]),
    ({"classes": ["x"], "labels": {"a.jpg": []}}, (), ["'a.jpg' (no image)"]),
    ({"classes": ["x"], "labels": {"../data/a": []}}, (), ["(no image)"]),
    ({"classes": ["x"], "labels": {"a": [0]}}, ["a.png"], ["'a' ('a.jpg' and 'a.png')", "only in their suffix"]),
    ('{"classes": ["x"], "labels": {"a": [0], "a": []}}', (), ["the key 'a' occurs twice"]),
])  # fmt: skip
def test_invalid_files(tmp_path, content, images, words):
    file = dataset(tmp_path, content, ["a.jpg", *images])
    with pytest.raises(DataError) as error:
        FiftyOne(file).train()
    for word in ["labels.json", *words]:
        assert word in str(error.value)
