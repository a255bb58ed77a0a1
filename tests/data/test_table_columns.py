"""Columns of tables published by people or exported by programs: found, omitted or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbsa_lightning.data.readers import VOC, Table
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import ConfigError, DataError


def text(folder, content, name="t.csv"):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def refused(path, *words, **options):
    with pytest.raises(DataError) as error:
        Table(path, **options).train()
    for word in (path, *words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize(
    "name",
    [
        "image",
        "Image",
        "IMAGE",
        "path",
        "file",
        "filename",
        "File Name",
        "file_name",
        "image_name",
        "Image Index",
        "img",
    ],
)
def test_names_of_the_image_column(tmp_path, name):
    path = text(tmp_path, f"{name},labels\na.jpg,cat\nb.jpg,dog\n")
    assert Table(path).train().paths.tolist() == ["a.jpg", "b.jpg"]
    assert read_images(path, ["cat"]).paths.tolist() == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "name", ["labels", "Labels", "label", "tags", "Tag", "CLASSES", "class", "category", "keywords", "Finding Labels"]
)
def test_names_of_the_labels_column(tmp_path, name):
    table = Table(text(tmp_path, f"image,{name}\na.jpg,cat;dog\nb.jpg,dog\n"))
    assert table.train().labels.tolist() == [[1, 1], [0, 1]]
    assert any(repr(name) in sentence for sentence in table.describe())


def test_columns_named_by_the_user(tmp_path):
    path = text(tmp_path, "image,Id,labels,Target\nx,a.jpg,p,0 1\ny,b.jpg,q,1\n")
    table = Table(path, image_column="Id", labels_column="Target", separator=" ").train()
    assert (table.paths.tolist(), table.class_names) == (["a.jpg", "b.jpg"], ("0", "1"))
    assert table.labels.tolist() == [[1, 1], [0, 1]]
    refused(path, "no column named 'tag'", "labels_column", "'Target'", labels_column="tag")
    refused(path, "no column named 'x'", "image_column", image_column="x")
    for name in ("image_column", "labels_column"):
        with pytest.raises(ConfigError, match=f"Table: {name}"):
            Table(path, **{name: ""})


def test_an_exact_name_has_priority(tmp_path):
    path = text(tmp_path, "Image,image,labels\nno,yes,cat\n")
    assert Table(path).train().paths.tolist() == ["yes"]
    refused(text(tmp_path, "Image,IMAGE,labels\na,b,cat\n"), "'Image', 'IMAGE'", "image_column")


def test_a_labels_column_that_may_be_a_class(tmp_path):
    """In a table of bottles, "label" is a class."""
    path = text(tmp_path, "image,bottle,label\na.jpg,1,1\nb.jpg,1,0\n")
    refused(path, "'label'", "class file", "labels_column: label")
    classes = text(tmp_path, "bottle:\nlabel:\n", "c.yaml")
    assert Table(path, class_file=classes).train().labels.tolist() == [[1, 1], [1, 0]]
    assert Table(path, labels_column="label").train().class_names == ("0", "1")


def test_names_next_to_class_columns(tmp_path):
    path = text(tmp_path, "image,category,cat,dog\na.jpg,pets,1,0\nb.jpg,pets,0,1\n")
    refused(path, "'category'", "'cat', 'dog'", "labels_column: category")
    assert Table(path, labels_column="category").train().class_names == ("pets",)
    path = text(tmp_path, "image,labels,cat,dog\na.jpg,cat,1,0\nb.jpg,dog,0,1\n")
    assert Table(path).train().class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["split", "Split", "fold", "is_valid", "subset"])
@pytest.mark.parametrize("rest", ["labels\na.jpg,{0},cat\nb.jpg,{1},dog\n", "cat,dog\na.jpg,{0},1,0\nb.jpg,{1},0,1\n"])
def test_a_column_that_divides_the_images_is_refused(tmp_path, name, rest):
    for parts in (("train", "test"), ("0", "1")):
        path = text(tmp_path, f"image,{name}," + rest.format(*parts))
        refused(path, f"the column {name!r} is refused because it divides the images", repr(parts[0]), "train and test")
    table = Table(text(tmp_path, f"image,{name}," + rest.format("train", "train"))).train()
    assert table.class_names == ("cat", "dog")


def test_a_class_may_be_called_split(tmp_path):
    path = text(tmp_path, "image,split,fold\na.jpg,1,0\nb.jpg,0,1\n")
    refused(path, "class file")
    classes = text(tmp_path, "split:\nfold:\n", "c.yaml")
    assert Table(path, class_file=classes).train().labels.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("head", ["", "Unnamed: 0", ",Unnamed: 0", "Unnamed: 0.1,Unnamed: 0"])
def test_the_index_of_pandas_is_omitted(tmp_path, head):
    numbers = ["2,0", "0,1"] if "," in head else ["2", "0"]
    path = text(tmp_path, f"{head},image,cat,dog\n{numbers[0]},c.jpg,1,1.0\n{numbers[1]},a.jpg,1,0.0\n")
    table = Table(path).train()
    assert (table.paths.tolist(), table.class_names) == (["c.jpg", "a.jpg"], ("cat", "dog"))
    assert table.labels.tolist() == [[1, 1], [1, 0]]


def test_the_index_of_pandas_in_parquet_is_omitted(tmp_path):
    columns = {"image": ["c.jpg", "a.jpg"], "cat": [1, 0], "__index_level_0__": [2, 0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert Table(str(tmp_path / "t.parquet")).train().class_names == ("cat",)


def test_other_columns_without_a_name_are_refused(tmp_path):
    refused(text(tmp_path, ",cat\na.jpg,1\nb.jpg,0\n"), "column 1 has no name", "'a.jpg' (row 2)", "index")
    refused(text(tmp_path, "image,cat,\na.jpg,1,\nb.jpg,0,1\n"), "column 3 has no name", "'1' (row 3)")


def test_delimiters_at_the_ends_of_rows(tmp_path):
    path = text(tmp_path, "image,cat,dog,,\na.jpg,1,0,,\nb.jpg,0,1,,\n")
    assert Table(path).train().class_names == ("cat", "dog")
    refused(text(tmp_path, "image,cat\na.jpg,1,\n"), "row 2", "3 cells", "remove the ',' at its end")


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"])
def test_a_first_line_with_the_delimiter(tmp_path, first):
    path = text(tmp_path, f"{first}\nimage;labels;note\na.jpg;cat,dog;x\nb.jpg;cat;y\n")
    assert Table(path).train().labels.tolist() == [[1, 1], [1, 0]]
    path = text(tmp_path, f"{first}\nimage;cat\na.jpg;1\nb.jpg;yes\n")
    refused(path, "'yes' (row 4)")
    refused(text(tmp_path, f"{first}\nimage;cat\na.jpg;1\nb.jpg;1;1\n"), "row 4")
    refused(text(tmp_path, f"{first}\n"), "is not a header")


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        *((cell, 1) for cell in ("TRUE", "true", "1.00", "1.")),
        *((cell, 0) for cell in ("FALSE", "0.000")),
        *((cell, -1) for cell in ("-1.0", "NaN", "NULL", "N/A", "None", "-", "")),
    ],
)
def test_cells_of_class_columns(tmp_path, cell, value):
    assert Table(text(tmp_path, f"image,cat\na.jpg,{cell}\nb.jpg,1\n")).train().labels.tolist() == [[value], [1]]


@pytest.mark.parametrize("cell", ["none", "0.5", "yes", "1e0", "01", "?"])
def test_cells_of_class_columns_that_are_refused(tmp_path, cell):
    refused(text(tmp_path, f"image,cat\na.jpg,{cell}\nb.jpg,1\n"), f"{cell!r} (row 2)")


def test_a_class_column_that_means_no_class(tmp_path):
    path = text(tmp_path, "image,No Finding,cat,dog\na.jpg,1,,\nb.jpg,0,1,0\nc.jpg,,,\n")
    refused(path, "'No Finding'", "nothing: [No Finding]", "class file")
    table = Table(path, nothing=["No Finding"]).train()
    assert table.class_names == ("cat", "dog")
    assert table.labels.tolist() == [[0, 0], [1, 0], [-1, -1]]
    path = text(tmp_path, "image,No Finding,cat\na.jpg,0,1\nb.jpg,1,1\n")
    refused(path, "row 3", "'No Finding'", "class 'cat'", nothing=["No Finding"])


def test_annotators_are_not_a_class(tmp_path):
    path = text(tmp_path, "image,annotator,cat,dog\na.jpg,0,1,0\na.jpg,1,1,1\nb.jpg,1,0,1\n")
    table = Table(path, repeated="unknown").train()
    assert (table.class_names, table.labels.tolist()) == (("cat", "dog"), [[1, -1], [0, 1]])


def test_review_makes_classes_unknown(tmp_path):
    """A table of predicted labels corrected by a person."""
    path = text(
        tmp_path,
        "image,labels,review,place,cat,cow,dog\n"
        "a.jpg,cat;dog,dog,1,.9,.1,.5\n"
        "b.jpg,none,cow;dog,2,.1,.5,.4\n"
        "c.jpg,cat,,3,.9,.0,.1\n"
        "d.jpg,,,4,.5,.5,.5\n"
        "e.jpg,none,none,5,.0,.0,.0\n",
    )
    table = Table(path)
    assert table.class_names == ("cat", "cow", "dog")
    assert table.train().labels.tolist() == [[1, 0, -1], [0, -1, -1], [1, 0, 0], [-1, -1, -1], [0, 0, 0]]
    assert "'review' are unknown" in table.describe()[0]


def test_review_without_class_names(tmp_path):
    path = text(tmp_path, "image,labels,review\na.jpg,cat;dog,blurred; but nice\n")
    refused(path, "row 2", "'review'", "'blurred', 'but nice'")
    classes = text(tmp_path, "cat:\ndog:\n", "c.yaml")
    refused(path, "row 2", "'blurred'", class_file=classes)


def test_tables_of_label_studio_are_refused(tmp_path):
    """Their empty cells mean "shows nothing" in some rows, and "not labeled" in others."""
    head = "annotation_id,annotator,id,image,labels\n"
    rows = '3,2,1,a.jpg,person\n2,1,1,a.jpg,"{""choices"":[""person"",""dog""]}"\n'
    refused(text(tmp_path, head + rows), "row 3", "JSON object", "Label Studio")
    refused(text(tmp_path, head + "3,2,1,a.jpg,person\n4,2,2,b.jpg,\n"), "row 3", "annotation_id", "'none'")
    table = Table(text(tmp_path, head + "3,2,1,a.jpg,person\n,,2,b.jpg,\n")).train()
    assert table.labels.tolist() == [[1], [-1]]


LINES = [
    {"image": "a.jpg", "labels": ["cat", "dog"], "width": 3},
    {"labels": [], "image": "b.jpg"},
    {"image": "c.jpg", "labels": None},
    {"image": "d.jpg", "box": {"x": 1}},
]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json", "t.csv"])
def test_json_lines(tmp_path, name):
    path = text(tmp_path, "\n\n".join(map(json.dumps, LINES)) + "\n", name)
    table = Table(path).train()
    assert table.paths.tolist() == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert table.labels.tolist() == [[1, 1], [0, 0], [-1, -1], [-1, -1]]
    assert read_images(path, ["cat"]).paths.tolist() == table.paths.tolist()


def test_json_lines_of_other_forms(tmp_path):
    path = text(tmp_path, '{"image": "a", "labels": "cat, dog"}\n{"image": "b", "labels": "cat"}', "t.jsonl")
    assert Table(path).train().labels.tolist() == [[1, 1], [1, 0]]
    path = text(tmp_path, '{"image": "a", "cat": true, "dog": 1.0}\n{"image": "b", "cat": 0}', "t.jsonl")
    assert Table(path).train().labels.tolist() == [[1, 1], [0, -1]]
    path = text(tmp_path, '{"image":"a","labels":["2020-01-01"]}\n{"image":"b","labels":["x\u2028y"]}\n', "t.jsonl")
    assert Table(path).train().class_names == ("2020-01-01", "x\u2028y")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"image": "a", "cat": 1}]', ["row 1", "not an object", "orient='records'"]),
        ('{\n "image": "a"\n}', ["row 1", "not a JSON object", "orient='records'"]),
        ('{"image": "a", "cat": 1}\n{"image": "b", "cat"', ["row 2", "not a JSON object"]),
        ('{"image": "a", "image": "b", "cat": 1}', ["row 1", "'image' occurs twice"]),
        ('{"image": "a", "labels": "cat"}\n{"image": "b", "labels": ["dog"]}', ["row 1", "same form"]),
        ('{"image": "a", "labels": {"choices": ["cat"]}}', ["row 1", "JSON object"]),
        ('{"image": "\\ud800", "cat": 1}', ["lone surrogate"]),
        ('{"image": ' + "[" * 100_000, ["row 1", "not a JSON object"]),
        ('{"image": ' + "1" * 10_000 + "}", ["row 1", "not a JSON object"]),
        ("", ["nor a JSON object"]),
        ("{}\n", ["nor a JSON object"]),
        ('{"images": [], "annotations": []}', ["'annotations'"]),
    ],
)
def test_json_lines_that_are_refused(tmp_path, content, words):
    refused(text(tmp_path, content, "t.json"), *words)


def test_each_table_is_described_in_a_sentence(tmp_path):
    train = text(tmp_path, "Image,Tags\na.jpg,cat|dog\nb.jpg,\n")
    test = text(tmp_path, "image,cat,dog\nc.jpg,1,0\n", "test.csv")
    sentences = Table(train, test).describe()
    assert sentences == [
        f"{train}: 2 images in column 'Image'; labels by name in column 'Tags', names separated by '|'",
        f"{test}: 1 images in column 'image'; labels by column, one column per class",
    ]


def test_sources_without_detection_have_no_description():
    assert VOC("voc").describe() == []


def test_numbers_can_be_names(tmp_path):
    table = Table(text(tmp_path, "image,labels\na.jpg,0;3\nb.jpg,3\n")).train()
    assert table.class_names == ("0", "3")
    assert np.array_equal(table.labels, [[1, 1], [0, 1]])
