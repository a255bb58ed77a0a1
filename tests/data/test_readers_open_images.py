"""Compares Open Images files of a tool and generated ones with expected matrices, and tests errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbsa_lightning.data.readers import OpenImages
from cbsa_lightning.errors import ConfigError, DataError

FILES = Path(__file__).parent / "labeltools" / "open_images"
LABELS = str(FILES / "train-annotations-human-imagelabels.csv")


def matrix(table) -> dict[str, list[int]]:
    return dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))


def test_files_of_a_tool():
    """Classes car, dog, person, tree. The person in beach/001 has a model's confidence, .9, and is thus unknown."""
    names = str(FILES / "class-descriptions.csv")
    images = str(FILES / "train-images-with-rotation.csv")
    source = OpenImages(LABELS, class_descriptions=names, train_images=images)
    source.prepare()
    assert source.class_names == ("car", "dog", "person", "tree")
    assert matrix(source.train()) == {
        "beach/001.jpg": [-1, 1, -1, -1],
        "beach/002.jpg": [-1, -1, -1, -1],
        "city/003.jpg": [1, -1, -1, -1],
    }
    assert source.test() is None
    assert source.describe() == [
        f"{LABELS}: 1 row with the confidence of a model: unknown",
        f"{LABELS}: 1 image without a verified label: unlabeled",
    ]
    source = OpenImages(LABELS)
    assert source.class_names == ("car", "dog", "person")
    assert matrix(source.train()) == {"beach/001.jpg": [-1, 1, -1], "city/003.jpg": [1, -1, -1]}


ROWS = """ImageID,Source,LabelName,Confidence
1,verification,/m/a,1
1,verification,/m/b,0
2,crowdsource-verification,/m/a,0
2,verification,/m/a,1.0
2,verification,/m/c,1
3,verification,/m/b,0.0
"""


def write(folder, text, name="t.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_present_absent_and_unknown(tmp_path):
    names = write(tmp_path, 'LabelName,DisplayName\n/m/b,Bird\n/m/a,"Cat, small"\n', "names.csv")
    test = write(tmp_path, "ImageID,Source,LabelName,Confidence\nx,,/m/b,1\n", "test.csv")
    source = OpenImages(write(tmp_path, ROWS), test, class_descriptions=names, suffix=".png", root="photos")
    assert source.class_names == ("Bird", "Cat, small")
    assert matrix(source.train()) == {"1.png": [0, 1], "2.png": [-1, -1], "3.png": [0, -1]}
    assert matrix(source.test()) == {"x.png": [1, -1]}
    assert str(source.train().root) == "photos"
    assert [note.partition("t.csv: ")[2] for note in source.describe()] == [
        f"1 row of labels that are not in {names}: omitted",
        "1 label with contradictory rows: unknown",
        "1 image without a verified label: unlabeled",
    ]


@pytest.mark.parametrize(("labels", "names", "images", "words"), [
    ("ImageID,LabelName\n1,a\n", None, None, ["t.csv: there is no column named 'Confidence'"]),
    ("ImageID,LabelName,Confidence\n1,a,2\n", None, None, ["row 2: Confidence must be", "found '2'"]),
    ("ImageID,LabelName,Confidence\n1,a,nan\n", None, None, ["found 'nan'"]),
    ("ImageID,LabelName,Confidence\n1,a,\n", None, None, ["found ''"]),
    ("ImageID,LabelName,Confidence\n../1,a,1\n", None, None, ["'../1.jpg' is outside"]),
    ("ImageID,LabelName,Confidence\n,a,1\n", None, None, ["the image path is empty"]),
    ("ImageID,LabelName,Confidence\n1,,1\n", None, None, ["empty name"]),
    ("ImageID,LabelName,Confidence\n1,a,1\nb/../1,a,1\n", None, None, ["t.csv, image '1'", "paths that occur twice"]),
    (ROWS, "x,y\n", None, ["no row contains a class of"]),
    (ROWS, '/m/a,"A\nB"\n', None, ["names.csv, row 1: the row is not CSV"]),
    (ROWS, "/m/a,A,B\n", None, ["names.csv, row 1", "is not a label name and a class name"]),
    (ROWS, "/m/a,A\n/m/a,B\n", None, ["names.csv, row 2: label '/m/a' occurs twice"]),
    (ROWS, "/m/a,A\n/m/b,A\n", None, ["names.csv: classes that occur twice"]),
    (ROWS, None, "ImageID,Subset\n1,train\n2,train\n", ["images that are not in", "images.csv: '3'"]),
    (ROWS, None, "ImageID,Subset\n1,a\n2,a\n3,a\n3,b\n", ["images.csv: an image is listed twice"]),
])  # fmt: skip
def test_invalid_files(tmp_path, labels, names, images, words):
    source = OpenImages(
        write(tmp_path, labels),
        class_descriptions=names and write(tmp_path, names, "names.csv"),
        train_images=images and write(tmp_path, images, "images.csv"),
    )
    with pytest.raises(DataError) as error:
        source.train()
    for word in words:
        assert word in str(error.value)


def test_invalid_arguments(tmp_path):
    with pytest.raises(ConfigError, match="train is None"):
        OpenImages(None)
    with pytest.raises(ConfigError, match="suffix cannot be a int"):
        OpenImages("t.csv", suffix=3)
    with pytest.raises(DataError, match=r"t\.csv \(train\)"):
        OpenImages(str(tmp_path / "t.csv")).prepare()
