"""Files for labeling tools: their content, and errors for names that a tool would ignore."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.labels.image_labels import ImageLabels
from cbsa_lightning.inference.labels.image_sizes import upright_sizes
from cbsa_lightning.inference.labels.tools import cvat_xml, fiftyone_labels, label_studio_config, label_studio_tasks

NAMES = ("car", "dog & cat")


@pytest.fixture
def labels():
    images = np.array(["beach/001.jpg", "mit Leerzeichen/ä 5%.jpg", "city/003.jpg"], np.dtypes.StringDType())
    probabilities = np.array([[0.99, 0.9], [0.5, 0.4], [0.01, 0.02]], np.float32)
    return ImageLabels.decided(images, NAMES, probabilities, np.array([0.5, 0.5]))


def test_label_studio_tasks(labels):
    tasks = label_studio_tasks(labels, "run-1", url="/data/local-files/?d=photos/")
    assert json.loads(json.dumps(tasks)) == tasks
    for task, image in zip(tasks, labels.images.tolist(), strict=True):
        assert parse_qs(urlsplit(task["data"]["image"]).query)["d"] == [f"photos/{image}"]
        assert task["data"]["path"] == image
        assert task["predictions"][0]["model_version"] == "run-1"
    first, second, nothing = (task["predictions"][0] for task in tasks)
    choices = {"from_name": "labels", "to_name": "image", "type": "choices"}
    assert first["result"] == [choices | {"value": {"choices": ["car", "dog & cat"]}}]
    assert second["result"] == [choices | {"value": {"choices": ["car"]}}]
    assert nothing["result"] == []
    scores = [task["predictions"][0]["score"] for task in tasks]
    assert 0 <= scores[1] < scores[0] < scores[2] <= 1  # uncertainty sampling starts with the lowest score
    assert tasks[1]["data"]["scores"] == "car 0.50, dog & cat 0.40"


def test_label_studio_config_names_all_classes(labels):
    view = ElementTree.fromstring(label_studio_config(labels, "tags"))
    (control,) = view.iter("Choices")
    assert control.attrib == {"name": "tags", "toName": "image", "choice": "multiple"}
    assert [choice.get("value") for choice in control] == list(NAMES)


def test_cvat_tags_are_in_review_order(labels, tmp_path):
    file = tmp_path / "annotations.xml"
    cvat_xml(labels).write(file, encoding="utf-8")
    root = ElementTree.parse(file).getroot()
    assert [label.findtext("name") for label in root.iter("label")] == list(NAMES)
    found = {image.get("name"): [tag.get("label") for tag in image] for image in root.iter("image")}
    assert list(found.items()) == [
        ("mit Leerzeichen/ä 5%.jpg", ["car"]),
        ("beach/001.jpg", ["car", "dog & cat"]),
        ("city/003.jpg", []),
    ]


def test_cvat_files_contain_the_sizes_of_the_upright_images(labels, tmp_path):
    picture = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the image is stored rotated by 90 degrees
    (tmp_path / "beach").mkdir()
    picture.save(tmp_path / "beach" / "001.jpg", exif=exif)
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    names = ("beach/001.jpg", "plain.png", "turned.png", "broken.jpg", "missing.jpg")
    sizes = upright_sizes([tmp_path / name for name in names])
    assert sizes == [(20, 30), (30, 20), (20, 30), None, None]
    root = cvat_xml(labels, [sizes[0], None, sizes[1]]).getroot()
    found = {image.get("name"): (image.get("width"), image.get("height")) for image in root.iter("image")}
    assert found == {
        "beach/001.jpg": ("20", "30"),
        "mit Leerzeichen/ä 5%.jpg": (None, None),
        "city/003.jpg": ("30", "20"),
    }


def test_image_sizes_are_read_without_decoding(tmp_path, monkeypatch):
    for suffix in ("jpg", "png", "webp", "tif"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert upright_sizes(sorted(tmp_path.iterdir())) == [(30, 20)] * 4


def test_fiftyone_names_images_without_their_suffix(labels):
    found = fiftyone_labels(labels)
    assert found["classes"] == list(NAMES)
    assert found["labels"]["beach/001"] == [
        {"label": 0, "confidence": pytest.approx(0.99)},
        {"label": 1, "confidence": pytest.approx(0.9)},
    ]
    assert found["labels"]["city/003"] == []


def test_fiftyone_refuses_names_that_differ_only_in_the_suffix():
    images = np.array(["a.jpg", "a.png"], np.dtypes.StringDType())
    labels = ImageLabels.decided(images, NAMES, np.zeros((2, 2), np.float32), np.ones(2))
    with pytest.raises(DataError, match="these are ambiguous: a"):
        fiftyone_labels(labels)
