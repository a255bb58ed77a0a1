"""Creates label files for import into the labeling tools Label Studio, CVAT and FiftyOne.

The servers silently drop unknown labels and control names, so this module checks names. Images are reviewed in the
order of their confidence: Label Studio's uncertainty sampling starts with the lowest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.inference.labels.image_labels import ImageLabels
from cbsa_lightning.io.files import replacing

Json = dict[str, Any]


def label_studio_tasks(
    labels: ImageLabels, model_version: str, url: str = "/data/local-files/?d=", control: str = "labels"
) -> list[Json]:
    """Creates tasks with predictions for a project that is configured by :func:`label_studio_config`.

    The ``data`` of each task contains the ``path`` of the image, which identifies the image in an export, its ``doubt``
    in bits, which the server's data manager can use for sorting, and ``scores`` for display.

    Args:
        labels: Labels of the images.
        model_version: Name of the model, which is displayed with its predictions.
        url: Prefix of the quoted path of an image.
        control: Name of the Choices control.
    """
    predictions = label_studio_predictions(labels, model_version, control)
    return [
        {
            "data": {
                "image": url + quote(path),
                "path": path,
                "doubt": round(float(doubt), 4),
                "scores": _shown(labels, row),
            },
            "predictions": [prediction],
        }
        for row, (path, doubt, prediction) in enumerate(
            zip(labels.images.tolist(), labels.doubt, predictions, strict=True)
        )
    ]


def label_studio_predictions(
    labels: ImageLabels, model_version: str, control: str = "labels", image: str = "image"
) -> list[Json]:
    """Creates a prediction for each image, which contains its labels and a ``score``.

    The score is the confidence of all decisions about the image, in [0, 1].

    Args:
        labels: Labels of the images.
        model_version: Name of the model.
        control: Name of the Choices control.
        image: Name of the image that the control refers to.
    """
    confidence = 1 - labels.doubt / max(len(labels.class_names), 1)
    return [
        {
            "model_version": model_version,
            "score": round(float(score), 6),
            "result": _choices(names, control, image),
        }
        for score, names in zip(confidence, labels.names(labels.given), strict=True)
    ]


def label_studio_config(labels: ImageLabels, control: str = "labels") -> str:
    """Returns the labeling interface of a Label Studio project for these classes, as XML."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    choices = ElementTree.SubElement(view, "Choices", name=control, toName="image", choice="multiple")
    for name in labels.class_names:
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.SubElement(view, "Text", name="scores", value="$scores")
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode")


def cvat_xml(
    labels: ImageLabels, sizes: Sequence[tuple[int, int] | None] | None = None
) -> ElementTree.ElementTree[Any]:
    """Creates annotations in the format "CVAT for images 1.1", with one tag per label, in the review order.

    Args:
        labels: Labels of n images.
        sizes: n pairs (width, height) of the upright images, with None for an unknown size. None instead of the list
            means that all sizes are unknown.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    ElementTree.SubElement(task, "size").text = str(len(labels.images))
    known = ElementTree.SubElement(task, "labels")
    for name in labels.class_names:
        label = ElementTree.SubElement(known, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "type").text = "tag"
        ElementTree.SubElement(label, "attributes")
    given = labels.names(labels.given)
    for number, row in enumerate(np.argsort(labels.places).tolist()):
        image = ElementTree.SubElement(root, "image", id=str(number), name=str(labels.images[row]))
        if sizes is not None and (size := sizes[row]) is not None:
            image.set("width", str(size[0]))
            image.set("height", str(size[1]))
        for name in given[row]:
            ElementTree.SubElement(image, "tag", label=name, source="auto")
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def fiftyone_labels(labels: ImageLabels) -> Json:
    """Returns ``labels.json`` of a FiftyOneImageClassificationDataset, which identifies images by path without suffix.

    Raises:
        DataError: If the paths of two images differ only in their suffix.
    """
    keys = [str(PurePosixPath(path).with_suffix("")) for path in labels.images.tolist()]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise DataError(
            f"FiftyOne identifies images without suffix, so these are ambiguous: {listed(twice)}. Rename the files."
        )
    found = {
        key: [
            {"label": int(k), "confidence": round(float(labels.probabilities[row, k]), 6)}
            for k in np.flatnonzero(labels.given[row])
        ]
        for row, key in enumerate(keys)
    }
    return {"classes": list(labels.class_names), "labels": found}


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_xml(path: Path, tree: ElementTree.ElementTree[Any]) -> None:
    """Writes an XML file atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    with replacing(path) as draft:
        tree.write(draft, encoding="utf-8", xml_declaration=True)


def _choices(names: list[str], control: str, image: str) -> list[Json]:
    """Returns the result of a prediction, which is empty if the image gets no class."""
    if not names:
        return []
    return [{"from_name": control, "to_name": image, "type": "choices", "value": {"choices": names}}]


def _shown(labels: ImageLabels, row: int, number: int = 5) -> str:
    """Formats the most probable classes of an image with their probabilities."""
    best = np.argsort(-labels.probabilities[row], kind="stable")[:number]
    return ", ".join(f"{labels.class_names[k]} {labels.probabilities[row, k]:.2f}" for k in best)
