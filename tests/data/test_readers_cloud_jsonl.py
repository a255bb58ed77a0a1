"""Compares JSON lines of SageMaker Ground Truth and Vertex AI with expected matrices, and tests errors."""

from __future__ import annotations

import json

import pytest

from cbsa_lightning.data.readers import CloudLines
from cbsa_lightning.errors import ConfigError, DataError


def matrix(table) -> dict[str, list[int]]:
    return dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))


def manifest(folder, *lines, name="t.manifest") -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text)
    return str(folder / name)


MULTI = {"type": "groundtruth/image-classification-multilabel", "human-annotated": "yes"}


def sagemaker(name, codes=None, names=None, **more):
    line = {"source-ref": f"s3://b/photos/{name}"}
    if codes is None:
        return line
    metadata = {**MULTI, "class-map": names, "confidence-map": {"1": 0.9}, **more}
    return line | {"tags": codes, "tags-metadata": metadata}


def vertex(name, *names, use=None):
    line = {"imageGcsUri": f"gs://b/photos/{name}"}
    if names:
        line["classificationAnnotations"] = [{"displayName": label} for label in names]
    if use:
        line["dataItemResourceLabels"] = {"aiplatform.googleapis.com/ml_use": use}
    return line


def test_ground_truth(tmp_path):
    """Classes in use: car, dog, person. b shows none, c is unlabeled, d has failed, e was labeled by a model."""
    failed = {"source-ref": "s3://b/photos/d.jpg", "tags-metadata": {"failure-reason": "too large"}}
    file = manifest(
        tmp_path,
        sagemaker("x/a.jpg", [1, 2], {"1": "dog", "2": "person"}),
        sagemaker("b.jpg", [], {}),
        "",
        sagemaker("c.jpg"),
        failed,
        sagemaker("e.jpg", [0], {"0": "car"}, **{"human-annotated": "no"}),
    )
    source = CloudLines(file, prefix="s3://b/photos")
    source.prepare()
    assert source.class_names == ("car", "dog", "person")
    assert matrix(source.train()) == {
        "x/a.jpg": [0, 1, 1], "b.jpg": [0, 0, 0], "c.jpg": [-1, -1, -1], "d.jpg": [-1, -1, -1], "e.jpg": [1, 0, 0],
    }  # fmt: skip
    assert [note.partition("manifest: ")[2] for note in source.describe()] == [
        "2 images without labels: unlabeled",
        "1 image whose labeling failed: also unlabeled",
        "1 image labeled by a model (human-annotated: no): read like the others",
        "the classes are the labels in use, so classes without images are missing",
    ]


def test_ground_truth_with_one_label_per_image(tmp_path):
    metadata = {"type": "groundtruth/image-classification", "class-name": "dog"}
    line = {"source-ref": "s3://b/photos/a.jpg", "sport": 0, "sport-metadata": metadata, "mine": 1}
    assert matrix(CloudLines(manifest(tmp_path, line), prefix="s3://b/photos").train()) == {"a.jpg": [1]}


def test_vertex(tmp_path):
    file = manifest(
        tmp_path,
        vertex("a.jpg", "dog", "car", use="training"),
        vertex("b.jpg"),
        vertex("c.jpg", "None_of_the_above"),
        vertex("d.jpg", "dog", use="test"),
        vertex("e.jpg", "car", use="validation"),
        name="t.jsonl",
    )
    source = CloudLines(file, prefix="gs://b/photos", nothing=["None_of_the_above"])
    assert source.class_names == ("car", "dog")
    assert matrix(source.train()) == {"a.jpg": [1, 1], "b.jpg": [-1, -1], "c.jpg": [0, 0], "e.jpg": [1, 0]}
    assert matrix(source.test()) == {"d.jpg": [0, 1]}
    assert source.describe()[1].endswith("1 validation image by ml_use: read with the training images")


A = sagemaker("a.jpg", [1], {"1": "dog"})


@pytest.mark.parametrize(("lines", "options", "words"), [
    ([""], {}, ["is empty"]),
    (["{"], {}, ["line 1: cannot be read as JSON"]),
    ([A, "[]"], {}, ["line 2 must be an object"]),
    (
        [{"image_url": "azureml://a.jpg"}],
        {},
        ["line 1: the line has neither 'source-ref' (SageMaker) nor", "'image_url'"],
    ),
    ([A | {"source-ref": 3}], {}, ["source-ref must be a string, found 3"]),
    ([A | {"source-ref": "s3://other/a.jpg"}], {}, ["1 of 1", "'s3://other/a.jpg'", "not below 's3://b/photos/'"]),
    ([A | {"source-ref": "s3://b/photos/../../a.jpg"}], {}, ["is outside"]),
    ([A, A], {}, ["paths that occur twice", "line 1", "line 2"]),
    ([sagemaker("a.jpg", [2], {"1": "dog"})], {}, ["class-map: the key '2' is missing"]),
    ([sagemaker("a.jpg", ["1"], {"1": "dog"})], {}, ["tags must be an integer, found '1'"]),
    ([sagemaker("a.jpg", 1, {"1": "dog"})], {}, ["tags must be a list, found 1"]),
    ([sagemaker("a.jpg", [1], {"1": "dog"}, type="groundtruth/boxes")], {}, ["has type 'groundtruth/boxes'"]),
    ([A | {"more": 1, "more-metadata": {}}], {}, ["several label attributes: 'tags'", "'more'"]),
    ([A], {"attribute": "tag"}, ["no label attribute 'tag' (did you mean 'tags'?)"]),
    ([A, sagemaker("b.jpg") | {"tags": [1]}], {}, ["line 2: the line has 'tags' without its metadata"]),
    ([{"imageGcsUri": "s3://b/photos/a.jpg", "boundingBoxAnnotations": []}], {}, ["has 'boundingBoxAnnotations'"]),
    ([{"imageGcsUri": "s3://b/photos/a.jpg", "classificationAnnotations": [3]}], {}, ["annotation must be an object"]),
    ([sagemaker("a.jpg")], {}, ["no answer contains a label"]),
])  # fmt: skip
def test_invalid_files(tmp_path, lines, options, words):
    with pytest.raises(DataError) as error:
        CloudLines(manifest(tmp_path, *lines), prefix="s3://b/photos", **options).train()
    for word in ["t.manifest", *words]:
        assert word in str(error.value)


def test_one_of_several_attributes(tmp_path):
    source = CloudLines(
        manifest(tmp_path, A | {"more": 1, "more-metadata": {}}), prefix="s3://b/photos", attribute="tags"
    )
    assert matrix(source.train()) == {"a.jpg": [1]}
    assert source.describe()[0].endswith("1 label attribute not read: 'more'")


def test_invalid_arguments():
    with pytest.raises(ConfigError, match="attribute cannot be a int"):
        CloudLines("t.manifest", attribute=3)
