"""Predictions for existing tasks of a Label Studio project."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.labels.image_labels import ImageLabels
from cbsa_lightning.inference.labels.project_tasks import Project, predictions_for_tasks

EXPORT = Path(__file__).parent.parent / "data" / "labeltools" / "label_studio" / "json_all_tasks.json"
CONFIG = """<View><Image name="picture" value="$photo"/>
<Choices name="tags" toName="picture" choice="multiple">
<Choice value="dog"/><Choice value="motor car" alias="car"/><Choice value="none"/></Choices></View>"""


@pytest.fixture
def labels():
    images = np.array(["beach/001.jpg", "mit Leerzeichen/ä 5%.jpg", "new.jpg"], np.dtypes.StringDType())
    probabilities = np.array([[0.99, 0.1, 0.9], [0.1, 0.1, 0.1], [0.1, 0.9, 0.1]], np.float32)
    return ImageLabels.decided(images, ("car", "dog", "person"), probabilities, np.full(3, 0.5))


@pytest.fixture
def animals():
    images = np.array(["a.jpg", "b.jpg"], np.dtypes.StringDType())
    return ImageLabels.decided(images, ("car", "dog"), np.array([[0.9, 0.8], [0.1, 0.2]], np.float32), np.full(2, 0.5))


def predictions(labels, export, config=None, control=None, prefix=None):
    return predictions_for_tasks(labels, Project(export, config, control, export.parent, prefix), "run-1")


def task(number, path, *choices, kind="choices", **more):
    result = {"from_name": "tags", "to_name": "picture", "type": kind, "value": {"choices": list(choices)}}
    annotations = [{"result": [result], "was_cancelled": False}] if choices else []
    return {"id": number, "data": {"photo": "x", "image": "x", "path": path}, "annotations": annotations, **more}


def write(folder, content, name="export.json"):
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_tasks_of_a_real_export_keep_their_ids(labels):
    made, notes = predictions(labels, EXPORT, prefix="photos")
    ids = {task["id"]: task["data"]["image"] for task in json.loads(EXPORT.read_text())}
    beach = [number for number, image in ids.items() if image.endswith("beach/001.jpg")]
    assert [body["task"] for body in made if body["result"]] == beach
    assert len({body["task"] for body in made}) == len(made)
    assert made[0].keys() == {"task", "model_version", "score", "result"}
    assert made[0]["model_version"] == "run-1"
    assert made[0]["result"] == [
        {"from_name": "labels", "to_name": "image", "type": "choices", "value": {"choices": ["car", "person"]}}
    ]
    assert [body["result"] for body in made if body["task"] not in beach] == [[]] * (len(made) - len(beach))
    text = "\n".join(notes)
    assert f"{len(ids) - len(made)} tasks of images that the run does not label" in text
    assert "1 image of the run without a task in the export" in text
    assert "'new.jpg'" in text


def test_names_are_read_from_the_labeling_interface(animals, tmp_path):
    export = write(tmp_path, [task(7, "b.jpg"), task(3, "./a.jpg", "dog", meta={"x": 1}), task(4, "a.jpg")])
    before = export.read_bytes()
    made, notes = predictions(animals, export, write(tmp_path, CONFIG, "c.xml"))
    assert [body["task"] for body in made] == [7, 3, 4]
    assert made[0]["result"] == []
    assert (
        made[1]["result"]
        == made[2]["result"]
        == [{"from_name": "tags", "to_name": "picture", "type": "choices", "value": {"choices": ["car", "dog"]}}]
    )
    assert any("1 choice of the project without a class of the run, never predicted: 'none'" in n for n in notes)
    assert any("1 task with an answer: also predicted" in note for note in notes)
    assert export.read_bytes() == before


def test_names_are_read_from_the_annotations(animals, tmp_path):
    made, notes = predictions(animals, write(tmp_path, [task(1, "a.jpg"), task(2, "b.jpg", "dog")]))
    assert made[0]["result"][0]["from_name"] == "tags"
    assert made[0]["result"][0]["to_name"] == "picture"
    assert any("no annotation uses 1 of the 2 classes" in note and "'car'" in note for note in notes)


@pytest.mark.parametrize(("tasks", "config", "words"), [
    ([task(1, "a.jpg")], None, "do not define the control and image of predictions"),
    ([task(1, "a.jpg", "horse")], None, r"choices that are not classes of the run: 'horse' \(.*task 1\)"),
    ([task(1, "a.jpg", "horse")], CONFIG, r"choices that are not in .*c.xml: 'horse'"),
    ([task(1, "a.jpg")], CONFIG.replace('alias="car"', ""), "no choice for these classes of the run: 'car'"),
    ([task(1, "a.jpg")], CONFIG.replace("multiple", "single"), "more than one for 1 image"),
    ([task(1, "a.jpg", "dog")], CONFIG.replace('"tags"', '"other"'), "control 'tags' is not in label_config"),
    ([task(1, "a.jpg", "dog", kind="rectanglelabels")], None, "result of 'rectanglelabels'"),
    ([task(1, "z.jpg", "dog")], None, "no task has an image of the run"),
    ([task(1, "a.jpg", "dog"), task(1, "b.jpg")], None, "record 2 has the id of another task"),
    ([task(1, "a.jpg", "dog", project=1), task(2, "b.jpg", project=2)], None, "tasks of several projects"),
    ([task(None, "a.jpg", "dog")], None, "id must be an integer"),
    ([{"data": {"image": "elsewhere.jpg"}, "id": 1, "annotations": task(1, "", "dog")["annotations"]}], None,
     "'elsewhere.jpg'"),
    ([{"id": 1, "annotation_id": 2}], None, "is a JSON_MIN export"),
    ([], None, "has no task"),
])  # fmt: skip
def test_tasks_of_another_project_are_refused(animals, tmp_path, tasks, config, words):
    interface = None if config is None else write(tmp_path, config, "c.xml")
    with pytest.raises(DataError, match=words):
        predictions(animals, write(tmp_path, tasks), interface)
