"""Compares exports written by a Label Studio server with expected matrices, and tests errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbsa_lightning.data.readers import LabelStudio
from cbsa_lightning.errors import ConfigError, DataError
from layouts import write_image

FILES = Path(__file__).parent / "labeltools" / "label_studio"
CONFIG = """<View><Image name="image" value="$image"/><Choices name="labels" toName="image" choice="multiple">
<Choice value="car"/><Choice value="dog"/><Choice value="person"/><Choice value="tree"/></Choices></View>"""

# Expected labels; classes car, dog, person, tree. Two annotators chose {person, dog} and {person} for beach/001;
# 002 is skipped; two chose nothing for city/003, whose further tasks are open; 004 is a car; 006 has a draft.
OF_ALL = {
    "beach/001.jpg": [0, -1, 1, 0],
    "beach/002.jpg": [-1, -1, -1, -1],
    "city/003.jpg": [0, 0, 0, 0],
    "mit Leerzeichen/ä 5%.jpg": [-1, -1, -1, -1],
    "city/004.jpg": [1, 0, 0, 0],
    "city/006.jpg": [-1, -1, -1, -1],
}
ANSWERED = {"beach/001.jpg", "city/003.jpg", "city/004.jpg"}
HELD = {  # images in each file
    "json_all_tasks.json": set(OF_ALL),
    "json_default.json": ANSWERED | {"beach/002.jpg"},
    "json_min_all_tasks.json": set(OF_ALL) - {"beach/002.jpg"},
    "json_min_default.json": ANSWERED,
    "csv_all_tasks.csv": set(OF_ALL) - {"beach/002.jpg"},
    "csv_default.csv": ANSWERED,
    "tsv_default.tsv": ANSWERED,
}


def matrix(table) -> dict[str, list[int]]:
    return dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.xml"
    file.write_text(CONFIG)
    return str(file)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("prefix", ["photos", "/data/local-files/?d=photos/", "photos/"])
def test_files_of_the_server(name, prefix, config):
    source = LabelStudio(str(FILES / name), label_config=config, prefix=prefix)
    source.prepare()
    assert source.class_names == source.prompt_names == ("car", "dog", "person", "tree")
    assert matrix(source.train()) == {path: row for path, row in OF_ALL.items() if path in HELD[name]}
    assert source.test() is None


@pytest.mark.parametrize("name", HELD)
def test_classes_in_use_without_a_configuration(name):
    source = LabelStudio(str(FILES / name), prefix="photos")
    assert source.class_names == ("car", "dog", "person")
    assert matrix(source.train()) == {path: row[:3] for path, row in OF_ALL.items() if path in HELD[name]}
    assert "the classes are the labels in use" in source.describe()[-1]


def test_notes_count_other_content(config):
    source = LabelStudio(str(FILES / "json_all_tasks.json"), label_config=config, prefix="photos")
    file = str(FILES / "json_all_tasks.json")
    assert source.describe() == [
        f"{file}: 1 task skipped by an annotator: unlabeled",
        f"{file}: 1 task with only a draft: unlabeled",
        f"{file}: 4 tasks without an answer: unlabeled",
        f"{file}: 7 tasks with predictions, which are not read",
        f"{file}: 3 further records of images that already have one",
        f"{file}: 2 images with several answers, which are combined",
        f"{file}: 1 label of 1 image on which answers differ: 1 unknown, 0 by the majority",
    ]


def choices(*names, control="labels", kind="choices", **more):
    return {"from_name": control, "to_name": "image", "type": kind, "value": {"choices": list(names), **more}}


def answer(*results, cancelled=False):
    return {"result": list(results), "was_cancelled": cancelled}


def task(image, *annotations, **more):
    return {"data": {"image": image}, "annotations": list(annotations), "predictions": [], **more}


def write(folder, content, name="t.json") -> str:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def read(folder, tasks, **options):
    return LabelStudio(write(folder, tasks), **options).train()


def test_majority(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / name, 0)
    dog, cat = answer(choices("dog")), answer(choices("cat"))
    tasks = [task("a.jpg", dog, dog, cat), task("b.jpg", dog, cat), task("b.jpg", answer(cancelled=True))]
    assert matrix(read(tmp_path, tasks)) == {"a.jpg": [-1, -1], "b.jpg": [-1, -1]}
    source = LabelStudio(write(tmp_path, tasks), disagreement="majority")
    assert matrix(source.train()) == {"a.jpg": [0, 1], "b.jpg": [-1, -1]}
    assert any(
        "4 labels of 2 images on which answers differ: 2 unknown, 2 by the majority" in s for s in source.describe()
    )


def test_train_and_test(tmp_path, config):
    train = write(tmp_path, [task("a.jpg", answer(choices("tree", "car")))], "a.json")
    test = write(tmp_path, [{"data": {"image": "x", "path": "b.jpg"}, "annotations": [answer()]}], "b.json")
    write_image(tmp_path / "a.jpg", 0)
    source = LabelStudio(train, test, label_config=config)
    assert matrix(source.train()) == {"a.jpg": [1, 0, 0, 1]}
    assert matrix(source.test()) == {"b.jpg": [0, 0, 0, 0]}


def test_class_file_with_classes_and_synonyms(tmp_path):
    classes = write(tmp_path, "dog: {synonyms: [hound]}\ncat: house cat\n", "c.yaml")
    write_image(tmp_path / "a.jpg", 0)
    source = LabelStudio(write(tmp_path, [task("a.jpg", answer(choices("hound")))]), class_file=classes)
    assert matrix(source.train()) == {"a.jpg": [1, 0]}
    assert source.prompt_names == ("dog", "house cat")


def test_aliases_are_the_classes_and_values_the_prompts(tmp_path):
    text = CONFIG.replace('value="tree"', 'value="oak tree" alias="t"').replace("$image", "$photo")
    source = LabelStudio(
        write(tmp_path, [{"data": {"photo": "p", "path": "a.jpg"}, "annotations": [answer(choices("t"))]}]),
        label_config=write(tmp_path, text, "c.xml"),
    )
    assert source.class_names[-1] == "t"
    assert source.prompt_names[-1] == "oak tree"
    assert matrix(source.train()) == {"a.jpg": [0, 0, 0, 1]}


def test_a_choice_that_means_nothing(tmp_path):
    write_image(tmp_path / "a.jpg", 0)
    write_image(tmp_path / "b.jpg", 0)
    tasks = [task("a.jpg", answer(choices("none"))), task("b.jpg", answer(choices("dog")))]
    assert matrix(read(tmp_path, tasks, nothing=["none"])) == {"a.jpg": [0], "b.jpg": [1]}
    with pytest.raises(
        DataError, match=r"record 1: a label for 'shows no class' occurs together with others: 'none', 'dog'"
    ):
        read(tmp_path, [task("a.jpg", answer(choices("none", "dog")))], nothing=["none"])


def test_other_controls_are_counted(tmp_path):
    write_image(tmp_path / "a.jpg", 0)
    comment = {"from_name": "why", "to_name": "image", "type": "textarea", "value": {"text": ["blurred"]}}
    tasks = [task("a.jpg", answer(choices("dog"), comment), answer(comment))]
    source = LabelStudio(write(tmp_path, tasks), control="labels")
    assert matrix(source.train()) == {"a.jpg": [-1]}
    assert source.describe()[0].endswith("2 results of 'textarea' (control 'why'): not read")


@pytest.mark.parametrize(("value", "prefix", "path"), [
    ("/data/local-files/?d=photos/mit%20Leerzeichen/%C3%A4%205%25.jpg", "photos", "mit Leerzeichen/ä 5%.jpg"),
    ("http://localhost:8080/data/local-files/?d=photos/a.jpg", "photos", "a.jpg"),
    ("/data/local-files/?d=photos%5Cbeach%5C001.jpg", "photos", "beach/001.jpg"),
    ("s3://bucket/p/a%20b.jpg", "s3://bucket/p", "a%20b.jpg"),
    ("https://host/p/a%20b.jpg?token=x", "https://host/p/", "a b.jpg"),
    ("beach/001.jpg", None, "beach/001.jpg"),
    ("/data/local-files/?d=beach/001.jpg", None, "beach/001.jpg"),
    ("/data/upload/2/3c5d2cb5-001.jpg", None, "beach/001.jpg"),
    ("/data/upload/2/3c5d2cb5-001.jpg", "photos", "beach/001.jpg"),
    ("http://localhost:8080/studio/data/upload/2/3c5d2cb5-001.jpg", None, "beach/001.jpg"),
    ("/data/upload/2/0a1b2c3d-kept.jpg", None, "0a1b2c3d-kept.jpg"),
    ("gs://b/elsewhere/001.jpg", None, "beach/001.jpg"),
    ("elsewhere/001.jpg", None, "beach/001.jpg"),
])  # fmt: skip
def test_forms_of_image_paths(tmp_path, value, prefix, path):
    for name in ("beach/001.jpg", "beach/002.jpg", "city/002.jpg", "0a1b2c3d-kept.jpg"):
        write_image(tmp_path / name, 0)
    assert read(tmp_path, [task(value, answer(choices("dog")))], prefix=prefix).paths.tolist() == [path]


@pytest.mark.parametrize(("values", "prefix", "words"), [
    (["/data/upload/1/3c5d2cb5-002.jpg"], None, ["3c5d2cb5-002.jpg", "2 images have this name"]),
    (["/data/upload/1/3c5d2cb5-%C3%A4_5.jpg"], None, ["no images have this name"]),
    (["/data/upload/1/3c5d2cb5-1.jpg", "/data/upload/1/aaaaaaaa-1.jpg"], None, ["matches the same file as"]),
    (["https://evil.example/1.jpg", "photos/1.jpg"], "photos", ["1 of 2", "evil.example", "not below 'photos/'"]),
    (["/data/local-files/?d=other/1.jpg"], "photos", ["record 1", "not below 'photos/'"]),
    (["/data/local-files/?d=photosx/1.jpg"], "photos", ["not below 'photos/'"]),
    (["/data/local-files/?x=1"], None, ["must have exactly one d="]),
    (["/data/local-files/?d=%FF.jpg"], None, ["utf-8"]),
    (["http://[bad/1.jpg"], None, ["Invalid IPv6"]),
    (["/data/local-files/?d=photos/../../x.jpg"], "photos", ["is outside"]),
    (["/etc/passwd"], None, ["is outside"]),
    ([""], None, ["contains no file name"]),
    (["folder/"], None, ["contains no file name"]),
])  # fmt: skip
def test_images_that_are_not_matched_are_listed(tmp_path, values, prefix, words):
    for name in ("1.jpg", "beach/002.jpg", "city/002.jpg"):
        write_image(tmp_path / name, 0)
    with pytest.raises(DataError) as error:
        read(tmp_path, [task(value, answer(choices("dog"))) for value in values], prefix=prefix)
    for word in ["t.json", *words]:
        assert word in str(error.value)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(
        DataError, match=r"t\.json, record 1: 'b\.jpg' cannot be matched by its file name: .*no image in this folder"
    ):
        read(tmp_path, [task("b.jpg")])


BOX = {"from_name": "box", "to_name": "image", "type": "rectanglelabels", "value": {"x": 1, "rectanglelabels": ["dog"]}}
GOOD = task("a.jpg", answer(choices("dog")))


@pytest.mark.parametrize(("tasks", "words"), [
    ("{", ["cannot be read as JSON"]),
    ("[" * 100_000, ["cannot be read as JSON"]),
    ({}, ["an export must be a list, found {}"]),
    ([], ["contains no tasks"]),
    ([3], ["record 1 must be an object, found 3"]),
    ('[{"data": {}, "data": {}}]', ["the key 'data' occurs twice"]),
    ([{"data": {"image": "a.jpg"}}], ["has no 'annotations'", "export the project as JSON"]),
    ([{"annotations": []}], ["record 1: the key 'data' is missing"]),
    ([task(3)], ["record 1: image must be a string, found 3"]),
    ([task(["a.jpg", "b.jpg"])], ["image must be a string"]),
    ([{"id": 7, "data": {"text": "hello"}, "annotations": []}], ["task 7: the data has no 'image', only 'text'"]),
    ([{"data": {"image": "a.jpg", "path": 3}, "annotations": []}], ["path must be a string or null, found 3"]),
    ([GOOD | {"data": {"image": "a.jpg", "path": "../a.jpg"}}], ["'../a.jpg' is outside"]),
    ([task("a.jpg", answer(BOX))], ["record 1: the task has a result of 'rectanglelabels' (control 'box')"]),
    ([task("a.jpg", answer(choices("dog"), choices("good", control="quality")))], ["several controls", "'quality'"]),
    ([task("a.jpg", answer(choices("dog", x=1, y=2)))], ["also have 'x', 'y'", "whole images"]),
    ([task("a.jpg", answer(choices(["animal", "dog"])))], ["a choice must be a string"]),
    ([task("a.jpg", answer({"type": "choices", "value": {}}))], ["from_name None"]),
    ([task("a.jpg", answer({"type": "choices", "from_name": "labels", "value": {}}))], ["key 'choices' is missing"]),
    ([task("a.jpg", {"result": 1})], ["result must be a list, found 1"]),
    ([task("a.jpg", {})], ["the key 'result' is missing"]),
    ([task("a.jpg", {"result": [], "was_cancelled": "no"})], ["was_cancelled must be true or false, found 'no'"]),
    ([GOOD | {"project": 1}, GOOD | {"project": 2}], ["tasks of several projects: 1", "2"]),
    ([task("a.jpg", answer(choices("")))], ["empty name"]),
    ([task("a.jpg", answer())], ["no answer contains a label"]),
])  # fmt: skip
def test_invalid_exports(tmp_path, tasks, words):
    write_image(tmp_path / "a.jpg", 0)
    with pytest.raises(DataError) as error:
        read(tmp_path, tasks)
    for word in ["t.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(("tasks", "options", "words"), [
    ([task("a.jpg", answer(choices("dgo")))], {}, ["record 1", "'dgo' (did you mean 'dog'?)", "class list"]),
    ([task("a.jpg", answer(choices("dog", control="other")))], {}, ["control 'other' is not in label_config"]),
    ([GOOD], {"control": "label"}, ["no Choices 'label' about an image (did you mean 'labels'?)"]),
    ([task("a.jpg", answer({**choices("dog"), "to_name": "second"}))], {}, ["'second', not about the image 'image'"]),
])  # fmt: skip
def test_exports_of_another_project(tmp_path, config, tasks, options, words):
    write_image(tmp_path / "a.jpg", 0)
    with pytest.raises(DataError) as error:
        read(tmp_path, tasks, label_config=config, **options)
    for word in words:
        assert word in str(error.value)


def test_a_control_without_results(tmp_path):
    write_image(tmp_path / "a.jpg", 0)
    with pytest.raises(DataError, match=r"no result belongs to control 'label' \(did you mean 'labels'\?\)"):
        read(tmp_path, [GOOD], control="label")


@pytest.mark.parametrize(("text", "message"), [
    ("<View>", "is not XML"),
    ('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "declares a document type"),
    ('<View><Text name="t" value="$t"/><Choices name="c" toName="t"/></View>', "no Choices about a whole Image, only"),
    (CONFIG.replace('toName="image"', 'toName="image" perRegion="true"'), "no Choices about a whole Image"),
    (CONFIG.replace('<Choice value="car"/>', '<Choice value="car"><Choice value="bus"/></Choice>'), "nested choices"),
    (CONFIG.replace('value="car"', ""), "a Choice has no value"),
    (CONFIG.replace('value="$image"', 'valueList="$images"'), "which is not a task key"),
    ('<View><Image name="i" value="$i"/><Choices name="c" toName="i" value="$options"/></View>', "there is no Choice"),
    (CONFIG.replace("</View>", CONFIG.partition(">")[2]).replace('"labels"', '"more"', 1), "several Choices"),
])  # fmt: skip
def test_invalid_configurations(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        _ = LabelStudio(write(tmp_path, [GOOD]), label_config=write(tmp_path, text, "c.xml")).class_names


ROW = {"image": "a.jpg", "id": 1, "annotation_id": 1, "labels": {"choices": ["dog"]}}


@pytest.mark.parametrize(("rows", "options", "message"), [
    ([ROW | {"labels": "dog"}], {}, "ambiguous which column contains the choices"),
    ([ROW | {"more": {"choices": []}}], {}, "several do: 'labels', 'more'"),
    ([ROW], {"control": "label"}, r"no row has a column named 'label' \(did you mean 'labels'"),
    ([ROW, {"image": "a.jpg"}], {}, "record 2: the key 'annotation_id' is missing"),
    ([ROW | {"annotation_id": "1"}], {}, "annotation_id must be an integer or null"),
    ([ROW, ROW | {"annotation_id": None}], {}, "record 2: the row has 'labels' but no annotation_id"),
    ([ROW | {"labels": [{"x": 1}]}], {"control": "labels"}, "labels must be a string or an object"),
    ([ROW | {"labels": {"taxonomy": []}}], {"control": "labels"}, "labels must be a choice or"),
    ([{"annotation_id": 1, "labels": {"choices": []}}], {}, "the data has no 'image'"),
])  # fmt: skip
def test_invalid_json_min(tmp_path, rows, options, message):
    write_image(tmp_path / "a.jpg", 0)
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows, **options)


@pytest.mark.parametrize(("text", "message"), [
    ("image,labels\na.jpg,dog\n", "no column named 'annotation_id'.*export as JSON"),
    ('annotation_id,image,labels\n1,a.jpg,"{""choices"":"\n', "row 2, column 'labels': cannot be read as JSON"),
    ("annotation_id,image,labels\nx,a.jpg,dog\n", "row 2: annotation_id must be an integer or empty, found 'x'"),
    ("annotation_id,labels\n1,dog\n", "no 'image'"),
])  # fmt: skip
def test_invalid_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        LabelStudio(write(tmp_path, text, "t.csv"), control="labels").train()


def test_json_min_of_an_open_task_with_an_empty_control(tmp_path):
    write_image(tmp_path / "a.jpg", 0)
    write_image(tmp_path / "b.jpg", 0)
    rows = [ROW, {"image": "b.jpg", "annotation_id": None, "labels": {"choices": []}}]
    assert matrix(read(tmp_path, rows)) == {"a.jpg": [1], "b.jpg": [-1]}


def test_csv_written_by_pandas_with_gaps(tmp_path):
    write_image(tmp_path / "a.jpg", 0)
    write_image(tmp_path / "b.jpg", 0)
    file = write(tmp_path, "annotation_id,image,doubt,labels\n3.0,a.jpg,.5,dog\n,b.jpg,,\n", "t.csv")
    source = LabelStudio(file, control="labels")
    assert matrix(source.train()) == {"a.jpg": [1], "b.jpg": [-1]}
    assert source.describe()[1].endswith("1 column not read: 'doubt'")


@pytest.mark.parametrize(("options", "message"), [
    ({"train": 3}, "LabelStudio: train cannot be a int"),
    ({"train": None}, "train is None"),
    ({"disagreement": "both"}, "disagreement must be 'unknown' or 'majority'"),
    ({"nothing": "none"}, "nothing cannot be a str"),
    ({"nothing": [1]}, "nothing must be a list of strings"),
    ({"control": 1}, "control cannot be a int"),
    ({"prefix": 1}, "prefix cannot be a int"),
])  # fmt: skip
def test_invalid_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        LabelStudio(**{"train": "t.json", **options})


def test_an_empty_prefix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="prefix is empty"):
        read(tmp_path, [GOOD], prefix="")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"t\.json \(train\).*c\.xml \(label_config\)"):
        LabelStudio(str(tmp_path / "t.json"), label_config="c.xml").prepare()
    with pytest.raises(DataError, match=r"t\.json is missing"):
        LabelStudio(str(tmp_path / "t.json")).train()
