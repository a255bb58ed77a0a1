"""Several rows for one image: a row for each label, copies, and annotators who agree or disagree."""

from __future__ import annotations

import numpy as np
import pytest

from cbsa_lightning.data.readers import Table
from cbsa_lightning.errors import ConfigError, DataError


def text(folder, content):
    (folder / "t.csv").write_text(content)
    return str(folder / "t.csv")


def refused(path, *words, **options):
    with pytest.raises(DataError) as error:
        Table(path, **options).train()
    for word in (path, *words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_a_row_for_each_label(tmp_path):
    path = text(tmp_path, "image,label\nb,cat\nb,dog\na,dog\nc,none\nb,cow\nd,\n")
    table = Table(path)
    assert table.train().paths.tolist() == ["b", "a", "c", "d"]
    assert table.train().labels.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0], [-1, -1, -1]]
    assert "6 rows for 4 images" in table.describe()[1]
    assert "adds a label" in table.describe()[1]


def test_a_single_image_with_two_labels_is_a_mistake(tmp_path):
    rows = "".join(f"{i},cat\n" for i in range(20))
    refused(text(tmp_path, "image,labels\n" + rows + "7,dog\n"), "'7' (rows 9 and 22)")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("image,labels\na,cat;dog\na,cat\nb,dog\n", ["'a' (rows 2 and 3)", "class 'dog'"]),
        ("image,labels\na,cat\na,dog\nb,cow\nb,cow\n", ["'a' (rows 2 and 3)"]),  # annotators agree on b
        ("image,labels\na,cat\na,dog\na,dog\nb,cow\n", ["'a' (rows 2 and 3 and 4)"]),
        ("image,labels\na,cat\na,none\nb,dog\n", ["'a' (rows 2 and 3)", "class 'cat'"]),
        ("image,labels,annotator\na,cat,1\na,dog,2\nb,dog,1\n", ["'a' (rows 2 and 3)"]),
        ("image,labels,Confidence\na,cat,1\na,dog,0\nb,dog,1\n", ["'a' (rows 2 and 3)"]),
        ("image,cat,dog\na,1,0\n./a,1,1\n", ["'a' (rows 2 and 3)", "class 'dog'"]),
    ],
)
def test_contradictory_rows_are_refused(tmp_path, rows, words):
    refused(text(tmp_path, rows), *words, "repeated: unknown", "repeated: union")


def test_contradictions_are_unknown_or_present_by_option(tmp_path):
    path = text(tmp_path, "image,labels\na,cat;dog\nb,cow\na,cat\na,cat;cow\n")
    unknown, union = Table(path, repeated="unknown"), Table(path, repeated="union")
    assert unknown.class_names == ("cat", "cow", "dog")
    assert unknown.train().labels.tolist() == [[1, -1, -1], [0, 1, 0]]
    assert union.train().labels.tolist() == [[1, 1, 1], [0, 1, 0]]
    assert "rows of 1 images contradict each other (unknown)" in unknown.describe()[1]


def test_identical_rows_are_merged_and_counted(tmp_path):
    table = Table(text(tmp_path, "image,labels\na,cat;dog\nb,cat\na,dog; cat\na,cat;dog\n"))
    assert table.train().labels.tolist() == [[1, 1], [1, 0]]
    assert "4 rows for 2 images, 2 of them with the labels of an earlier row" in table.describe()[1]


def test_a_label_known_in_one_row_is_known(tmp_path):
    table = Table(text(tmp_path, "image,cat,dog,cow\na,1,,\na,,0,\nb,1,1,1\n")).train()
    assert table.labels.tolist() == [[1, 0, -1], [1, 1, 1]]
    table = Table(text(tmp_path, "image,labels\na,\na,cat;dog\nb,cat\n")).train()
    assert table.labels.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("how", ["unknown", "union"])
def test_merging_equals_a_plain_loop(tmp_path, how):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 40, 120), rng.integers(-1, 2, (120, 3))
    rows = "".join(f"{i},{','.join(map(str, row))}\n" for i, row in zip(images, labels.tolist(), strict=True))
    table = Table(text(tmp_path, "image,x,y,z\n" + rows), repeated=how).train()
    expected: dict[str, list[set[int]]] = {}
    for image, row in zip(images, labels.tolist(), strict=True):
        for values, value in zip(expected.setdefault(str(image), [set(), set(), set()]), row, strict=True):
            values.add(value)
    assert table.paths.tolist() == list(expected)
    both = -1 if how == "unknown" else 1
    for row, sets in zip(table.labels.tolist(), expected.values(), strict=True):
        assert row == [both if {0, 1} <= values else max(values) for values in sets]


@pytest.mark.parametrize("choice", ["merge", True, None])
def test_choices(choice):
    with pytest.raises(ConfigError, match="Table: repeated"):
        Table("t.csv", repeated=choice)
