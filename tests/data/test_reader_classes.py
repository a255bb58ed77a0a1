"""Sources that take their classes from a checkpoint."""

from __future__ import annotations

import json

import pytest

from cbsa_lightning.data.readers.classes import Classes, TestImages
from cbsa_lightning.data.readers.coco import COCO
from cbsa_lightning.data.readers.label_studio import LabelStudio
from cbsa_lightning.data.readers.table import Table
from cbsa_lightning.errors import ConfigError, DataError


def test_classes_are_as_given_and_have_no_images():
    source = Classes(["cat", "tvmonitor"], ["cat", "tv monitor"])
    source.prepare()
    assert source.class_names == ("cat", "tvmonitor")
    assert source.prompt_names == ("cat", "tv monitor")
    for read in (source.train, source.test):
        with pytest.raises(DataError, match="have no images"):
            read()


def test_wrong_number_of_prompt_names_is_refused():
    with pytest.raises(ConfigError, match="prompt_names"):
        Classes(["cat", "dog"], ["cat"])


def coco(file, names):
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    images = [{"id": 7, "file_name": "a.jpg", "width": 9, "height": 9}]
    annotations = [{"id": 1, "image_id": 7, "category_id": 1}]
    file.write_text(json.dumps({"categories": categories, "images": images, "annotations": annotations}))


def sources(folder):
    """Returns sources without training annotations, each with a dog to test on."""
    (folder / "test.csv").write_text("image,labels\na.jpg,dog\n")
    task = {"id": 1, "data": {"image": "a.jpg", "path": "a.jpg"}}
    result = {"from_name": "c", "to_name": "i", "type": "choices", "value": {"choices": ["dog"]}}
    (folder / "test.json").write_text(json.dumps([{**task, "annotations": [{"id": 1, "result": [result]}]}]))
    coco(folder / "coco.json", ["cat", "dog"])
    files = {"train_annotations": "gone.json", "val_annotations": str(folder / "coco.json")}
    yield Table(str(folder / "gone.csv"), str(folder / "test.csv"))
    yield LabelStudio(str(folder / "gone.json"), str(folder / "test.json"))
    yield COCO(str(folder), **files, val_images=".")


@pytest.mark.parametrize("kind", range(3), ids=["table", "label-studio", "coco"])
def test_test_images_need_no_training_annotations(tmp_path, kind):
    source = TestImages(list(sources(tmp_path))[kind], "last.ckpt", ["cat", "dog"], ["cat", "puppy"])
    source.prepare()
    assert len(source.train()) == 0
    table = source.test()
    assert table.class_names == ("cat", "dog")
    assert table.labels.tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", range(3), ids=["table", "label-studio", "coco"])
def test_test_images_of_other_classes_are_refused(tmp_path, kind):
    source = TestImages(list(sources(tmp_path))[kind], "last.ckpt", ["cat", "bird"], ["cat", "bird"])
    with pytest.raises(DataError, match="dog"):
        source.test()
