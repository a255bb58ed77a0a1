"""The COCO reader on tiny files in the official layout and on real files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cbsa_lightning.data.readers import COCO, Source
from cbsa_lightning.data.readers.coco import COCO_CLASSES
from cbsa_lightning.errors import ConfigError, DataError
from layouts import COCO_IDS, make_coco


def names_of(table):
    return {
        path.rpartition("/")[2]: [table.class_names[k] for k in np.flatnonzero(row)]
        for path, row in zip(table.paths.tolist(), table.labels, strict=True)
    }


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_labels_and_string_order(tmp_path, year):
    train, val = make_coco(tmp_path, year=year)
    source = COCO(str(tmp_path), year=year)
    source.prepare()
    t, s = source.train(), source.test()
    assert list(names_of(t).items()) == list(train.items())
    assert list(names_of(s).items()) == list(val.items())
    assert t.class_names == COCO_CLASSES
    ids = [int(path[-16:-4]) for path in t.paths.tolist()]
    assert ids == sorted(ids, key=str)
    assert ids != sorted(ids)
    assert t.paths[0].startswith(f"train{year}/")
    assert t.missing_files() == s.missing_files() == []
    assert isinstance(source, Source)


def test_official_names():
    assert len(COCO_CLASSES) == len(COCO_IDS) == 80
    official = dict(zip(COCO_IDS, COCO_CLASSES, strict=True))
    # Spot checks on both sides of every gap in the official ids.
    assert {k: official[k] for k in (1, 11, 13, 25, 27, 31, 44, 46, 65, 67, 70, 72, 82, 84, 90)} == {
        1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 31: "handbag",
        44: "bottle", 46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv",
        82: "refrigerator", 84: "book", 90: "toothbrush",
    }  # fmt: skip


def test_names_before_download(tmp_path):
    source = COCO(str(tmp_path))
    assert source.class_names == source.prompt_names == COCO_CLASSES
    with pytest.raises(DataError) as error:
        source.prepare()
    for word in ("instances_train2014.json", "val2014", "COCO website", "train_annotations"):
        assert word in str(error.value)


def write(root, content, part="train"):
    path = root / "annotations" / f"instances_{part}2014.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def tiny():
    return {
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
        "images": [{"id": 10, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 10, "category_id": 7, "iscrowd": 1},
            {"image_id": 9, "category_id": 2},
            {"image_id": 9, "category_id": 2},
        ],
    }


def test_custom_categories(tmp_path):
    write(tmp_path, tiny())
    source = COCO(str(tmp_path))
    t = source.train()
    assert source.class_names == t.class_names == ("cat", "dog")
    assert t.paths.tolist() == ["train2014/a.jpg", "train2014/b.jpg"]  # "10" < "9"
    assert t.labels.tolist() == [[0, 1], [1, 0]]


def test_names_are_found_anywhere_in_the_file(tmp_path):
    last = tiny()
    last["categories"] = last.pop("categories")
    write(tmp_path, last)
    assert COCO(str(tmp_path)).class_names == ("cat", "dog")
    misleading = last | {"info": {"categories": 3}}
    write(tmp_path, misleading)
    assert COCO(str(tmp_path)).class_names == ("cat", "dog")


def change(path, value):
    def apply(content):
        here = content
        for key in path[:-1]:
            here = here[key]
        if value is None:
            del here[path[-1]]
        else:
            here[path[-1]] = value
        return content

    return apply


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("categories",), [], ["categories is empty"]),
        (("categories", 0, "id"), 2, ["ids that occur twice", "categories[0] and categories[1]"]),
        (("categories", 0, "name"), "cat", ["names that occur twice", "'cat'"]),
        (("categories", 0, "name"), None, ["categories[0] has no name"]),
        (("categories", 0, "id"), "7", ["categories[0]", "integer", "'7'"]),
        (("images", 1, "id"), 10, ["ids that occur twice", "images[0] and images[1]"]),
        (
            ("images", 1, "file_name"),
            "a.jpg",
            ["instances_train2014.json, image 10", "image 9", "paths that occur twice", "train2014/a.jpg"],
        ),
        (("images", 1, "file_name"), None, ["images[1] has no file_name"]),
        (("images", 1, "file_name"), "../../b.jpg", ["image 9", "outside"]),
        (("annotations", 1, "image_id"), 11, ["annotations[1]: image 11"]),
        (("annotations", 2, "category_id"), 3, ["annotations[2]: category 3"]),
        (("annotations", 2, "category_id"), None, ["annotations[2] has no category_id"]),
        (("categories", 0, "id"), True, ["categories[0]", "integer", "True"]),
        (("categories", 0, "id"), 7.0, ["categories[0]", "integer", "7.0"]),
        (("categories", 0, "name"), 5, ["categories[0]", "name must be a string", "5"]),
        (("categories", 0, "name"), [], ["categories[0]", "name must be a string"]),
        (("categories", 0, "name"), " ", ["instances_train2014.json", "class 1 has an empty name"]),
        (("categories", 0, "name"), "\ud800", ["instances_train2014.json", "lone surrogate"]),
        (("categories", 0), "dog", ["categories[0] has no id, name"]),
        (("images", 1, "id"), True, ["images[1]", "id must be an integer or a string"]),
        (("images", 1, "id"), [9], ["images[1]", "id must be an integer or a string"]),
        (("images", 1, "file_name"), 5, ["images[1]", "file_name must be a string", "5"]),
        (("images", 1, "file_name"), "a\0.jpg", ["image 9", "NUL"]),
        (("images", 1, "file_name"), "\udcff.jpg", ["image 9", "Unicode"]),
        (("images", 1, "file_name"), "x" * 10**5 + "/../../../y", ["image 9", "outside", "characters)"]),
        (("images", 1, "file_name"), "C:\\..\\..\\..\\y.jpg", ["image 9", "outside"]),
        (("images", 1, "file_name"), "\\\\server\\y.jpg", ["image 9", "outside"]),
        (("annotations", 1, "image_id"), 9.0, ["annotations[1]", "image_id", "9.0"]),
        (("annotations", 1, "category_id"), True, ["annotations[1]", "category_id", "True"]),
        (("annotations", 1, "category_id"), [2], ["annotations[1]", "category_id"]),
        (("annotations",), [], ["no image has an annotation"]),
        (("annotations",), None, ["no list 'annotations'"]),
    ],
)
def test_refused(tmp_path, path, value, words):
    write(tmp_path, change(path, value)(tiny()))
    with pytest.raises(DataError) as error:
        COCO(str(tmp_path)).train()
    for word in words:
        assert word in str(error.value)


def test_not_json(tmp_path):
    write(tmp_path, tiny()).write_text('{"categories": [')
    for read in (lambda c: c.train(), lambda c: c.class_names):
        with pytest.raises(DataError, match=r"instances_train2014\.json cannot be read as JSON"):
            read(COCO(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "recursion"),
        ('{"categories": ' + "[" * 100_000, "recursion"),
        ('{"categories": [], "images": [], "annotations": [], "categories": []}', "the key 'categories' occurs twice"),
        ('{"images": [{"id": 1, "id": 2, "file_name": "a"}]}', "the key 'id' occurs twice"),
        ('{"categories": ' + "1" * 5_000 + "}", "digits"),
        ("5", "no list 'images'"),
    ],
)
def test_malicious_json(tmp_path, content, words):
    path = write(tmp_path, tiny())
    path.write_text(content)
    for read in (lambda c: c.train(), lambda c: c.class_names):
        with pytest.raises(DataError, match=words) as error:
            read(COCO(str(tmp_path)))
        assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_json_in_another_encoding(tmp_path, encoding):
    path = write(tmp_path, tiny())
    path.write_bytes('{"categories": "caf\u00e9"}'.encode(encoding))
    with pytest.raises(DataError, match=r"instances_train2014\.json cannot be read as JSON \('utf-8'"):
        COCO(str(tmp_path)).train()


def test_unused_keys_may_occur_twice(tmp_path):
    path = write(tmp_path, tiny())
    path.write_text(path.read_text().replace('"iscrowd": 1', '"iscrowd": 1, "iscrowd": 0'))
    assert len(COCO(str(tmp_path)).train()) == 2


def test_paths_are_not_decoded(tmp_path):
    """For a file system, "%2e%2e" is an ordinary name."""
    write(tmp_path, change(("images", 1, "file_name"), "%2e%2e/%2e%2e/b.jpg")(tiny()))
    assert COCO(str(tmp_path)).train().paths.tolist()[1] == "train2014/%2e%2e/%2e%2e/b.jpg"


def test_parts_with_different_categories(tmp_path):
    write(tmp_path, tiny())
    write(tmp_path, change(("categories", 0, "name"), "wolf")(tiny()), "val")
    with pytest.raises(DataError, match="differ in dog, wolf"):
        COCO(str(tmp_path)).test()


def test_class_file(tmp_path):
    write(tmp_path, tiny())
    file = tmp_path / "c.yaml"
    file.write_text("cat: house cat\n")
    assert COCO(str(tmp_path), class_file=str(file)).train().prompt_names == ("house cat", "dog")


def test_real_images(realbench):
    folder = realbench / "coco-small"
    source = COCO(
        str(folder),
        train_annotations="annotations/instances_train.json",
        val_annotations="annotations/instances_val.json",
        train_images="images",
        val_images="images",
        unannotated="drop",
    )
    source.prepare()
    t, s = source.train(), source.test()
    assert (len(t), len(s)) == (251, 99)  # 255 and 100 minus the 5 images without an object
    assert source.class_names == COCO_CLASSES
    t.require_files()
    s.require_files()
    content = json.loads((folder / "annotations/instances_val.json").read_text())
    pairs = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    assert int(s.labels.sum()) == len(pairs)
    file = {image["file_name"]: image["id"] for image in content["images"]}
    number = {c["name"]: c["id"] for c in content["categories"]}
    assert pairs == {(file[f], number[name]) for f, names in names_of(s).items() for name in names}


@pytest.mark.parametrize(
    ("unannotated", "paths", "labels"),
    [
        ("drop", ["a.jpg", "b.jpg"], [[0, 1], [1, 0]]),
        ("unlabeled", ["a.jpg", "c.jpg", "b.jpg"], [[0, 1], [-1, -1], [1, 0]]),
        ("empty", ["a.jpg", "c.jpg", "b.jpg"], [[0, 1], [0, 0], [1, 0]]),
    ],
)
def test_images_without_an_annotation(tmp_path, unannotated, paths, labels):
    content = tiny()
    content["images"].append({"id": 11, "file_name": "c.jpg"})
    path = write(tmp_path, content)
    write(tmp_path, content, "val")
    table = COCO(str(tmp_path), unannotated=unannotated).train()
    assert table.paths.tolist() == [f"train2014/{name}" for name in paths]
    assert table.labels.tolist() == labels
    assert f"{path}: 1 of 3 images have no annotation" in COCO(str(tmp_path), unannotated=unannotated).describe()[0]
    assert len(COCO(str(tmp_path)).train()) == 2, "COCO's own files follow CAP's lists"
    own = COCO(str(tmp_path), train_annotations="annotations/instances_train2014.json")
    assert own.train().labels.tolist() == [[0, 1], [-1, -1], [1, 0]]
    assert len(own.test()) == 2


def test_invalid_choice_of_unannotated(tmp_path):
    with pytest.raises(ConfigError, match="COCO: unannotated"):
        COCO(str(tmp_path), unannotated="keep")


@pytest.mark.parametrize(
    ("change_of_file", "words"),
    [
        (lambda c: c["annotations"][0].update(image_id="10"), ["annotations[0]", "'10'", "a string", "an integer"]),
        (lambda c: c["images"][1].update(id="9"), ["annotations[1]", "image 9", "a string", "an integer"]),
        (lambda c: c["annotations"][0].update(image_id="1" * 10_000), ["annotations[0]", "correct or remove it"]),
        (
            lambda c: c.update(annotations=[{"id": 1, "image_id": 10, "caption": "a dog"}]),
            ["annotations[0]", "captions file", "instances file"],
        ),
        (lambda c: c["categories"].append({"id": 8, "name": "Dog"}), ["categories", "differ only in case", "'Dog'"]),
    ],
)
def test_errors_describe_the_file(tmp_path, change_of_file, words):
    content = tiny()
    change_of_file(content)
    path = write(tmp_path, content)
    with pytest.raises(DataError) as error:
        COCO(str(tmp_path)).train()
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_class_file_distinguishes_similar_categories(tmp_path):
    content = tiny()
    content["categories"].append({"id": 8, "name": "Dog"})
    write(tmp_path, content)
    (tmp_path / "c.yaml").write_text("Dog: a male dog\n")
    assert COCO(str(tmp_path), class_file=str(tmp_path / "c.yaml")).train().prompt_names == ("cat", "dog", "a male dog")
