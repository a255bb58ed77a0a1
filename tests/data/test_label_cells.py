"""Cells with names of classes in the forms written by people and programs."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbsa_lightning.data.readers import Table
from cbsa_lightning.data.readers.coco import COCO_CLASSES
from cbsa_lightning.data.readers.nuswide import NUSWIDE_CLASSES
from cbsa_lightning.data.readers.voc import VOC_CLASSES
from cbsa_lightning.errors import ConfigError, DataError

TRUTH = [{"red", "blue"}, {"green"}, set(), {"red", "green", "blue"}, {"blue", "green"}, {"red"}]
NAMES = ("blue", "green", "red")


def write(folder, cells, column="labels"):
    path = folder / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", column])
        writer.writerows([f"{i}.jpg", cell] for i, cell in enumerate(cells))
    return str(path)


def read(folder, cells, **options):
    """Returns the set of classes of each row; None for an unlabeled row."""
    table = Table(write(folder, cells), **options).train()
    return [
        None if (row == -1).all() else {name for name, value in zip(table.class_names, row, strict=True) if value == 1}
        for row in table.labels
    ]


def refused(folder, cells, *words, **options):
    path = write(folder, cells)
    with pytest.raises(DataError) as error:
        Table(path, **options).train()
    for word in (path, *words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (";".join, "names separated by ';'"),
        (" ; ".join, "names separated by ';'"),
        (",".join, "names separated by ','"),
        (", ".join, "names separated by ','"),
        ("|".join, "names separated by '|'"),
        (" ".join, "names separated by blanks"),
        ("  ".join, "names separated by blanks"),
        (lambda names: str(list(names)), "lists of names"),
        (lambda names: "[" + ",".join(f'"{name}"' for name in names) + "]", "lists of names"),
        (lambda names: "{" + ", ".join(f"'{name}'" for name in names) + "}", "lists of names"),
    ],
    ids=["a;b", "a ; b", "a,b", "a, b", "a|b", "a b", "a  b", "Python list", "JSON list", "Python set"],
)
@pytest.mark.parametrize("class_file", [False, True])
def test_forms_of_cells(tmp_path, cell, said, class_file):
    truth = [*TRUTH, {"red", "green"}, {"blue", "red"}]
    cells = [cell(sorted(names)) if names else "none" for names in truth]
    options = {}
    if class_file:
        (tmp_path / "c.yaml").write_text("blue:\ngreen:\nred:\n")
        options["class_file"] = str(tmp_path / "c.yaml")
    assert read(tmp_path, cells, **options) == truth
    source = Table(write(tmp_path, cells), **options)
    assert source.class_names == NAMES
    assert any(said in sentence for sentence in source.describe())


@pytest.mark.parametrize("separator", [";", ",", "|", "json"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_cells_are_read_as_written_or_refused(tmp_path, separator, data):
    """Names may contain blanks, and commas if these are not separators; unclear cells are refused."""
    mark = "," if separator in (";", "|") else " "
    name = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map(f"{mark} ".strip(" ").join)
    names = data.draw(st.lists(name, min_size=1, max_size=5, unique=True))
    truth = data.draw(st.lists(st.sets(st.sampled_from(names)), min_size=1, max_size=8))
    if separator == "json":
        cells = [json.dumps(sorted(row)) for row in truth]
    else:
        cells = [separator.join(sorted(row)) or "none" for row in truth]
    try:
        found = read(tmp_path, cells)
    except DataError:
        return  # no class, or commas and blanks that may separate names
    if separator == "json" or any(len(row) > 1 for row in truth):
        assert found == truth


@pytest.mark.parametrize("names", [COCO_CLASSES, VOC_CLASSES, NUSWIDE_CLASSES], ids=["COCO", "VOC", "NUS-WIDE"])
def test_names_of_the_benchmarks_stay_whole(tmp_path, names):
    assert read(tmp_path, names) == [{name} for name in names]


@pytest.mark.parametrize("separator", [";", ",", "|", " ", " / ", "\t", "and"])
def test_a_given_separator_is_used(tmp_path, separator):
    cells = [separator.join(sorted(names)) or "none" for names in TRUTH]
    assert read(tmp_path, cells, separator=separator) == TRUTH


@pytest.mark.parametrize("separator", ["", 3, b";"])
def test_a_separator_that_is_wrong(separator):
    with pytest.raises(ConfigError, match="Table: separator"):
        Table("t.csv", separator=separator)


@pytest.mark.parametrize(
    ("cells", "truth"),
    [
        (["dining table", "person", "traffic light"], [{"dining table"}, {"person"}, {"traffic light"}]),
        (["dining table;person", "person"], [{"dining table", "person"}, {"person"}]),
        (["dining table, person", "person"], [{"dining table", "person"}, {"person"}]),
        (["cheese, grated;ham", "cheese, grated"], [{"cheese, grated", "ham"}, {"cheese, grated"}]),
        (['["cheese, grated", "a;b"]', '["ham"]'], [{"cheese, grated", "a;b"}, {"ham"}]),
        (["['it\\'s', \"a 'b'\"]"], [{"it's", "a 'b'"}]),
        (["cat", "cat"], [{"cat"}, {"cat"}]),
    ],
)
def test_names_with_blanks_and_commas(tmp_path, cells, truth):
    assert read(tmp_path, cells) == truth


@pytest.mark.parametrize(
    ("names", "cells", "truth"),
    [
        (["cat dog", "cat", "dog"], ["cat dog", "cat", "dog"], [{"cat dog"}, {"cat"}, {"dog"}]),
        (["cat", "dog"], ["cat dog", "cat", "dog"], [{"cat", "dog"}, {"cat"}, {"dog"}]),
        (["a, b", "c"], ["a, b", "c"], [{"a, b"}, {"c"}]),
        (["a", "b", "c"], ["a, b", "c"], [{"a", "b"}, {"c"}]),
        (
            ["No Finding", "nan", "?", "[x]"],
            ["No Finding", "nan", "?", "[x]"],
            [{"No Finding"}, {"nan"}, {"?"}, {"[x]"}],
        ),
    ],
)
def test_a_class_file_defines_the_names(tmp_path, names, cells, truth):
    (tmp_path / "c.json").write_text(json.dumps(dict.fromkeys(names)))
    assert read(tmp_path, cells, class_file=str(tmp_path / "c.json")) == truth


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["cat;dog", "cat, dog"], ["row 3", "'cat, dog' may be 2 names", "separator: ';'"]),
        (["x;y", "cat, dog"], ["row 3", "'cat, dog'"]),
        (["x, a;y, a", "x, b;y, b", "x, a;y, b"], ["'x, a' may be 2 names"]),
        (["a|b", "c;d"], ["row 2", "';' and '|'", "separator"]),
        (["cat dog", "cat", "dog bird", "bird"], ["row 2", "'cat dog'", "separator: ' '", "class file"]),
        (["red car", "blue car", "red bus", "blue bus"], ["row 2", "'red car'", "separator"]),
        (['["cat", "dog"]', "cat"], ["row 3", "'cat'", "same form"]),
        (["cat", "[cat, dog]"], ["row 3", "'[cat, dog]'", "not a list of JSON or Python"]),
        (["['cat' 'dog']"], ["row 2", "not a list of JSON or Python"]),  # numpy; one string in Python
        (["[0, 1, 1]"], ["row 2", "something other than strings"]),
        (['["cat", null]'], ["row 2", "something other than strings"]),
        (['{"choices": ["cat", "dog"]}', "cat"], ["row 2", "JSON object", "Label Studio"]),
        (["[" * 100_000], ["row 2", "not a list of JSON or Python"]),
        (["[" + " " * 100_000], ["row 2", "not a list of JSON or Python"]),
        (["cat;", "dog"], ["row 2", "is empty", "';'", "'none'"]),
        (['["cat", ""]'], ["row 2", "is empty"]),
        (['["[]"]', '["cat"]'], ["row 2", "'[]'"]),
        (["'cat', 'dog'", "cat"], ["row 2", "in quotes"]),
        (["'cat';'dog'", "x;'cat'"], ["row 2", "in quotes"]),
    ],
)
def test_ambiguous_or_malformed_cells_are_refused(tmp_path, cells, words):
    refused(tmp_path, cells, *words)


def test_a_list_is_not_split_by_a_given_separator(tmp_path):
    refused(tmp_path, ['["cat", "dog"]'], "row 2", "part of a list", "separator", separator=",")


@pytest.mark.parametrize(
    "word",
    [
        "",
        "nan",
        "NaN",
        "NA",
        "N/A",
        "n/a",
        "NULL",
        "null",
        "None",
        "-",
        "unlabeled",
        "Unlabeled",
        "<NA>",
        "#N/A",
        " NA ",
    ],
)
@pytest.mark.parametrize("others", [["cat;dog"], ["cat"], ['["cat", "dog"]']])
def test_words_for_not_labeled(tmp_path, word, others):
    assert read(tmp_path, [*others, word])[1] is None


@pytest.mark.parametrize("word", ["none", "[]", "[ ]", " none "])
@pytest.mark.parametrize("others", [["cat;dog"], ["cat"], ['["cat", "dog"]']])
def test_words_for_shows_nothing(tmp_path, word, others):
    assert read(tmp_path, [*others, word])[1] == set()


def test_words_inside_lists(tmp_path):
    assert read(tmp_path, ['["cat"]', '["none"]', '["nan"]']) == [{"cat"}, set(), None]


@pytest.mark.parametrize("word", ["No Finding", "no_label", "NONE", "None of the above", "nothing", "?", "--"])
def test_words_that_resemble_nothing_are_refused(tmp_path, word):
    for cells in (["cat", word], ["cat;dog", word], [f"cat|{word}", "dog"], ['["cat"]', f'["{word}"]']):
        refused(tmp_path, cells, repr(word), f"nothing: [{word}]", "class file")


@pytest.mark.parametrize(
    "cells", [["cat|dog", "No Finding"], ['["cat", "dog"]', '["No Finding"]'], ["cat, dog", "No Finding"]]
)
def test_custom_words_for_nothing(tmp_path, cells):
    assert read(tmp_path, cells, nothing=["No Finding", "empty"]) == [{"cat", "dog"}, set()]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("cat;none", ["'none' occurs together with another name", "no class at all"]),
        ("cat;No Finding", ["'No Finding' occurs together with another name", "no class at all"]),
        ("cat;nan", ["'nan' occurs together with another name", "not labeled"]),
        ("NA;cat", ["'NA' occurs together with another name", "not labeled"]),
    ],
)
def test_words_next_to_names(tmp_path, cell, words):
    refused(tmp_path, ["cat;dog", cell], "row 3", *words, nothing=["No Finding"])


@pytest.mark.parametrize("nothing", ["No Finding", [3], [""], None, 5])
def test_words_for_nothing_are_a_list_of_strings(nothing):
    with pytest.raises(ConfigError, match="Table: nothing"):
        Table("t.csv", nothing=nothing)


def test_the_test_table_may_have_another_form(tmp_path):
    train = write(tmp_path, ["red;blue", "green", "none"])
    (tmp_path / "test").mkdir()
    test = write(tmp_path / "test", ["red, blue", "green"])
    assert Table(train, test).test().labels.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_many_rows(tmp_path):
    rng = np.random.default_rng(0)
    cells = np.array(["red;blue", "green", "none", ""])[rng.integers(0, 4, 100_000)]
    table = Table(write(tmp_path, cells.tolist())).train()
    assert (table.labels[cells == "red;blue"] == [1, 0, 1]).all()
    assert (table.labels[cells == ""] == -1).all()
    assert (table.labels[cells == "none"] == 0).all()
