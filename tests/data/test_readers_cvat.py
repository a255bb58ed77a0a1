"""Compares CVAT files ("CVAT for images 1.1") of three tools with expected matrices, and tests errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbsa_lightning.data.readers import CVAT
from cbsa_lightning.errors import ConfigError, DataError

FILES = Path(__file__).parent / "labeltools" / "cvat"

# Expected classes and tags of each image; an image without a tag is unlabeled.
MEANT = {
    "by_hand.xml": (
        ("person", "dog"),
        {"beach/001.jpg": [1, 1], "beach/002.jpg": [-1, -1], "mit Leerzeichen/ä 5%.jpg": [0, 1]},
    ),
    "datumaro_written.xml": (
        ("car", "dog", "person", "tree"),
        {"beach/001.jpg": [0, 1, 1, 0], "beach/002.jpg": [-1, -1, -1, -1], "city/003.jpg": [1, 0, 0, 0]},
    ),
    "fiftyone_written.xml": (("person", "dog"), {"beach/001.jpg": [1, 1], "beach/002.jpg": [-1, -1]}),
}


def matrix(table) -> dict[str, list[int]]:
    return dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))


@pytest.mark.parametrize("untagged", ["unlabeled", "nothing"])
@pytest.mark.parametrize("name", MEANT)
def test_files_of_the_tools(name, untagged):
    source = CVAT(str(FILES / name), untagged=untagged)
    source.prepare()
    names, meant = MEANT[name]
    assert source.class_names == source.prompt_names == names
    if untagged == "nothing":
        meant = {path: [max(label, 0) for label in row] for path, row in meant.items()}
    assert matrix(source.train()) == meant
    assert source.test() is None


def test_notes_count_other_content():
    file = str(FILES / "by_hand.xml")
    assert CVAT(file).describe() == [
        f"{file}: 1 image without a tag: unlabeled",
        f"{file}: 1 tag set by a model (source auto): read like the others",
    ]
    assert CVAT(file, untagged="nothing").describe()[0] == f"{file}: 1 image without a tag: shows nothing"


LABELS = "<label><name>cat</name><type>tag</type></label><label><name>none</name><type>any</type></label>"
BOXES = "<label><name>cat</name><type>rectangle</type></label>"


def export(folder, images, labels=LABELS, kind="task", name="a.xml") -> str:
    file = folder / name
    text = f"<annotations><meta><{kind}><labels>{labels}</labels></{kind}></meta>{images}</annotations>"
    file.write_text(text, encoding="utf-8")
    return str(file)


CAT = '<tag label="cat" source="semi-auto"><attribute name="sure">no</attribute></tag>'


@pytest.mark.parametrize("kind", ["task", "project", "job"])
def test_exports_of_a_task_a_project_and_a_job(tmp_path, kind):
    images = f'<image name="a.jpg">{CAT}</image><image name="b/c.jpg"/>'
    source = CVAT(export(tmp_path, images, kind=kind))
    assert matrix(source.train()) == {"a.jpg": [1, 0], "b/c.jpg": [-1, -1]}
    assert source.describe()[-1].endswith("1 attribute of tags: not read")


def test_a_tag_that_means_nothing_and_subsets(tmp_path):
    images = (
        f'<image name="a.jpg" subset="Train">{CAT}</image><image name="b.jpg" subset="Test"><tag label="none"/></image>'
        '<image name="c.jpg" subset="Validation"/>'
    )
    source = CVAT(export(tmp_path, images), nothing=["none"])
    assert source.class_names == ("cat",)
    assert matrix(source.train()) == {"a.jpg": [1], "c.jpg": [-1]}
    assert matrix(source.test()) == {"b.jpg": [0]}
    assert source.describe()[-1].endswith("1 validation image by its subset: read with the training images")
    with pytest.raises(DataError, match=r"a\.xml: the file marks 1 image for testing.*also a test file .*b\.xml"):
        CVAT(export(tmp_path, images), export(tmp_path, images, name="b.xml")).train()


def test_classes_may_differ_only_in_their_order(tmp_path):
    train = export(tmp_path, f'<image name="a.jpg">{CAT}</image>')
    dog = "<label><name>dog</name></label>"
    turned = dog + LABELS.replace("none", "bird")
    test = export(tmp_path, f'<image name="b.jpg">{CAT}</image>', labels=turned, name="b.xml")
    with pytest.raises(DataError, match=r"b\.xml: its classes are not those of .*a\.xml; they differ in 'bird', 'dog'"):
        CVAT(train, test).test()
    first = export(tmp_path, f'<image name="a.jpg">{CAT}</image>', labels=LABELS.replace("none", "bird") + dog)
    assert matrix(CVAT(first, test).test()) == {"b.jpg": [1, 0, 0]}


@pytest.mark.parametrize(("images", "options", "words"), [
    ("<image>", {}, ["is not XML"]),
    ("", {}, ["contains no images"]),
    ('<image name="a.jpg"/>', {"labels": ""}, ["no labels of a task or project or job"]),
    ('<image name="a.jpg"/>', {"labels": BOXES}, ["type 'rectangle', and none is a tag"]),
    ('<image name="a.jpg"/>', {"kind": "thing"}, ["no labels of a"]),
    ("<image/>", {}, ["image 1: the image has no name"]),
    ('<image name="a.jpg"><box label="cat"/></image>', {}, ["image 1 ('a.jpg'): the image has a 'box'", "COCO"]),
    ('<image name="a.jpg"><polygon label="cat"/></image>', {}, ["has a 'polygon'"]),
    ('<track id="0"/><image name="a.jpg"/>', {}, ["tracks of a video"]),
    ('<image name="a.jpg"/><box label="cat"/>', {}, ["besides images, the file contains 'box'"]),
    ('<image name="a.jpg"/>', {"labels": LABELS + '<image name="b.jpg"/>'}, ["unexpected element 'image'"]),
    ('<image name="a.jpg"><tag label="cat"><tag label="cat"/></tag></image>', {}, ["unexpected element 'tag'"]),
    ('<image name="a.jpg"><tag label="cta"/></image>', {}, ["tag 'cta' is not a label", "did you mean 'cat'"]),
    ('<image name="a.jpg"><tag/></image>', {}, ["tag None is not a label"]),
    ('<image name="../a.jpg"/>', {}, ["'../a.jpg' is outside"]),
    ('<image name="/etc/passwd"/>', {}, ["is outside"]),
    ('<image name="a.jpg"/><image name="./a.jpg"/>', {}, ["paths that occur twice", "image 1", "image 2"]),
    ('<image name="a.jpg"/>', {"labels": LABELS + LABELS}, ["classes that occur twice"]),
])  # fmt: skip
def test_invalid_exports(tmp_path, images, options, words):
    with pytest.raises(DataError) as error:
        CVAT(export(tmp_path, images, **options)).train()
    for word in ["a.xml", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("<annotation/>", "the root element is 'annotation', not 'annotations'"),
    ('<!DOCTYPE a [<!ENTITY b "ccc"><!ENTITY d "&b;&b;">]><annotations>&d;</annotations>', "declares a document type"),
    ("{}", "is not XML"),
    (b"\xff\xfe<\x00", "save the file as UTF-8"),
    ('<!DOCTYPE a [<!ENTITY b "ccc">]><annotations>&b;</annotations>'.encode("utf-16-le"), "contains NUL characters"),
])  # fmt: skip
def test_files_that_are_not_exports(tmp_path, text, message):
    (tmp_path / "a.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        CVAT(str(tmp_path / "a.xml")).train()


def test_choices_of_untagged():
    with pytest.raises(ConfigError, match="untagged must be 'unlabeled' or 'nothing'"):
        CVAT("a.xml", untagged="empty")
