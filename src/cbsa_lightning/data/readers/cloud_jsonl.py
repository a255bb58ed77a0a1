"""JSON lines of cloud services: SageMaker Ground Truth manifests, and Vertex AI import and export files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbsa_lightning.arguments import check_kind
from cbsa_lightning.data.class_names import did_you_mean
from cbsa_lightning.data.readers.answers import Record
from cbsa_lightning.data.readers.exports import Content, Export
from cbsa_lightning.data.readers.locations import find_images
from cbsa_lightning.data.readers.structured import counted, field, read_json_lines, typed
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

_USE = "aiplatform.googleapis.com/ml_use"
_METADATA = "-metadata"
_MULTI, _SINGLE = "groundtruth/image-classification-multilabel", "groundtruth/image-classification"


class CloudLines(Export):
    """Image labels in the JSON lines of SageMaker Ground Truth (``source-ref``) or Vertex AI (``imageGcsUri``).

    A line lists the classes that the image shows, and all other classes are absent. If a line has no labels, or the
    labeling failed, the image is unlabeled. Lines that Vertex AI marks as "test" are the test images.

    Args:
        train: File with the training images.
        test: File with the test images.
        root: Folder that contains the images. Defaults to the folder that contains each file.
        class_file: Class file with the class list and prompt names. The lines contain only the labels in use.
        prefix: URL of ``root`` in the bucket, such as "s3://bucket/photos".
        attribute: Name of the label attribute (SageMaker). Required if there are several.
        nothing: Labels that mean "shows no class", such as "None_of_the_above". They are not classes.

    Raises:
        ConfigError: If an argument has the wrong type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_file: str | None = None,
        prefix: str | None = None,
        attribute: str | None = None,
        nothing: Sequence[str] = (),
    ) -> None:
        super().__init__(train, test, root, class_file, nothing)
        check_kind("CloudLines: prefix", prefix, str, "a URL")
        check_kind("CloudLines: attribute", attribute, str, "the name of a label attribute")
        self._prefix, self._attribute = prefix, attribute

    def _load(self, file: Path, root: Path) -> Content:
        lines = read_json_lines(file)
        counts: Counter[str] = Counter()
        images, answers, tests = [], [], []
        attribute, others = _attribute(file, lines, self._attribute)
        for where, line in lines:
            if "imageGcsUri" in line:
                images.append(field(line, "imageGcsUri", (str,), where))
                answers.append(_vertex(line, where))
                use = field(field(line, "dataItemResourceLabels", (dict,), where, {}), _USE, (str,), where, "")
                tests.append(use.lower() == "test")
                counts["validation image"] += use.lower() == "validation"
            elif "source-ref" in line:
                images.append(field(line, "source-ref", (str,), where))
                answers.append(_ground_truth(line, attribute, where, counts))
                tests.append(False)
            else:
                raise DataError(
                    f"{where}: the line has neither 'source-ref' (SageMaker) nor 'imageGcsUri' (Vertex AI), only "
                    f"{listed(map(brief, line)) or 'nothing'}; export labels of images"
                )
        paths, by_name = find_images(images, root, self._prefix, lambda i: lines[i][0])
        counts["name"], counts["image"] = len(by_name), sum(not found for found in answers)
        records = [
            Record(path, where, found, test)
            for path, (where, _), found, test in zip(paths, lines, answers, tests, strict=True)
        ]
        said = {
            "image": ("image", "without labels: unlabeled"),
            "failed": ("image", "whose labeling failed: also unlabeled"),
            "model": ("image", "labeled by a model (human-annotated: no): read like the others"),
            "validation image": ("validation image", "by ml_use: read with the training images"),
            "name": ("record", "matched with an image only by its file name"),
        }
        notes = [f"{counted(counts[key], noun)} {rest}" for key, (noun, rest) in said.items() if counts[key]]
        if others:
            notes.append(f"{counted(len(others), 'label attribute')} not read: {listed(map(brief, others))}")
        return Content(records, notes=notes)


def _vertex(line: dict[str, Any], where: str) -> list[list[str]]:
    """Returns the answer in a line of Vertex AI, if there is one."""
    if wrong := [key for key in line if key.endswith(("Annotation", "Annotations")) and "classification" not in key]:
        raise DataError(
            f"{where}: the line has {listed(map(brief, wrong))}; only classifications of whole images are supported"
        )
    found = field(line, "classificationAnnotations", (list,), where, [])
    if "classificationAnnotation" in line:  # used by single-label data sets
        found = [*found, field(line, "classificationAnnotation", (dict,), where)]
    names = [field(typed(one, (dict,), f"{where}: an annotation"), "displayName", (str,), where) for one in found]
    return [names] if names else []


def _attribute(
    file: Path, lines: list[tuple[str, dict[str, Any]]], attribute: str | None
) -> tuple[str | None, list[str]]:
    """Returns the name of SageMaker's label attribute, or None if there is none, and names of unread attributes."""
    first: dict[str, str] = {}
    for where, line in lines:
        for key in line:
            if key.endswith(_METADATA) and "source-ref" in line:
                first.setdefault(key.removesuffix(_METADATA), where)
    found = listed(f"{brief(name)} ({where})" for name, where in first.items())
    if attribute is None and len(first) > 1:
        raise DataError(f"{file}: the file has several label attributes: {found}; set attribute to one of them")
    if attribute is not None and attribute not in first:
        raise DataError(
            f"{file}: the file has no label attribute "
            f"{brief(attribute)}{did_you_mean(attribute, first)}, only {found or 'none'}"
            "; correct attribute"
        )
    attribute = next(iter(first), None) if attribute is None else attribute
    return attribute, [name for name in first if name != attribute]


def _ground_truth(line: dict[str, Any], attribute: str | None, where: str, counts: Counter[str]) -> list[list[str]]:
    """Returns the answer in a line of SageMaker Ground Truth, if there is one."""
    if attribute is None or attribute + _METADATA not in line:
        if attribute in line:
            raise DataError(
                f"{where}: the line has {attribute!r} without its metadata; use an unmodified output manifest"
            )
        return []
    metadata = field(line, attribute + _METADATA, (dict,), where)
    if "failure-reason" in metadata:
        counts["failed"] += 1
        return []
    kind = field(metadata, "type", (str,), where)
    if kind not in (_MULTI, _SINGLE):
        raise DataError(f"{where}: the line has type {brief(kind)}; only image classification is supported")
    counts["model"] += field(metadata, "human-annotated", (str,), where, "yes") == "no"
    if kind == _SINGLE:
        return [[field(metadata, "class-name", (str,), where)]]
    names = field(metadata, "class-map", (dict,), where)
    chosen = []
    for code in field(line, attribute, (list,), where):
        typed(code, (int,), f"{where}: {attribute}")
        chosen.append(field(names, str(code), (str,), f"{where}: class-map"))
    return [chosen]
