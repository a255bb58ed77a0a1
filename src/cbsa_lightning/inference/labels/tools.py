"""Files of labels that labeling tools import: Label Studio, CVAT and FiftyOne.

The servers accept labels and control names that they do not know and drop them without a word, so names are checked
here. Confidence orders the images for review: Label Studio's uncertainty sampling starts with the lowest.
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
    """Tasks with predictions, to be imported into a project whose configuration :func:`label_studio_config` gives.

    Each task's ``data`` holds the image's ``path``, by which an export is matched, ``doubt`` in bits, by which the
    server's data manager can sort, and ``scores`` to show.

    Args:
        labels: Of the images.
        model_version: Name of the model, shown beside its predictions.
        url: What stands before the quoted path of an image.
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
    """The prediction for each image: its given labels, and as ``score`` the confidence of all decisions in [0, 1].

    Args:
        labels: Of the images.
        model_version: Name of the model.
        control: Name of the Choices control.
        image: Name of the image that the control is about.
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
    """Labeling interface of a Label Studio project for these classes, as XML."""
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
    """Annotations in the format "CVAT for images 1.1": one tag for each given label, in the order of review.

    Args:
        labels: Of n images.
        sizes: n pairs (width, height) of the upright images; None where one is not known, or for all.
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
    """``labels.json`` of a FiftyOneImageClassificationDataset, which names images by their path without suffix.

    Raises:
        DataError: Images that differ in their suffix only.
    """
    keys = [str(PurePosixPath(path).with_suffix("")) for path in labels.images.tolist()]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise DataError(
            f"FiftyOne names images without their suffix, so it cannot tell these apart: {listed(twice)}. Rename the "
            "files."
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
    """Writes JSON, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_xml(path: Path, tree: ElementTree.ElementTree[Any]) -> None:
    """Writes XML, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as draft:
        tree.write(draft, encoding="utf-8", xml_declaration=True)


def _choices(names: list[str], control: str, image: str) -> list[Json]:
    """The result of a prediction; empty where no class is given."""
    if not names:
        return []
    return [{"from_name": control, "to_name": image, "type": "choices", "value": {"choices": names}}]


def _shown(labels: ImageLabels, row: int, number: int = 5) -> str:
    """The most probable classes of an image with their probabilities, for a person."""
    best = np.argsort(-labels.probabilities[row], kind="stable")[:number]
    return ", ".join(f"{labels.class_names[k]} {labels.probabilities[row, k]:.2f}" for k in best)
