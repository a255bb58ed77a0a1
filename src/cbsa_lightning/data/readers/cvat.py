"""Exports of CVAT in the format "CVAT for images 1.1", with tags of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element

from cbsa_lightning.arguments import check_choice
from cbsa_lightning.data.class_names import did_you_mean
from cbsa_lightning.data.readers.answers import Record
from cbsa_lightning.data.readers.exports import Content, Export
from cbsa_lightning.data.readers.structured import counted, read_xml
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

_OF = ("task", "project", "job")
_TAG_TYPES = ("tag", "any", "")


class CVAT(Export):
    """Export of a CVAT task, project or job in which annotators tag images.

    The tags of an image are its classes, and all other classes are absent. The file does not contain whether an image
    without tags was inspected. Such an image is therefore unlabeled, unless ``untagged`` is "nothing". Images of a
    subset "test" are the test images. The classes are the labels of the task that can be used as tags.

    Args:
        train: XML file with the training images.
        test: XML file with the test images.
        root: Folder that contains the images. Defaults to the folder that contains each file.
        class_file: Class file with prompt names (see ``read_class_file``).
        untagged: Meaning of an image without tags: "unlabeled", or "nothing" if it shows no class.
        nothing: Tags that mean "seen, and shows no class". They are not classes.

    Raises:
        ConfigError: If an argument has the wrong type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_file: str | None = None,
        untagged: Literal["unlabeled", "nothing"] = "unlabeled",
        nothing: Sequence[str] = (),
    ) -> None:
        super().__init__(train, test, root, class_file, nothing)
        check_choice("CVAT: untagged", untagged, ("unlabeled", "nothing"))
        self._untagged = untagged

    def _load(self, file: Path, root: Path) -> Content:
        top = read_xml(file)
        if top.tag != "annotations":
            raise DataError(
                f"{file}: the root element is {brief(top.tag)}, not 'annotations'; export the task as CVAT "
                "for images 1.1"
            )
        if top.find("track") is not None:
            raise DataError(
                f"{file}: the file contains tracks of a video; export it as CVAT for images 1.1, and tag images"
            )
        if more := sorted({child.tag for child in top} - {"version", "meta", "image"}):
            raise DataError(
                f"{file}: besides images, the file contains {listed(map(brief, more))}; export it as CVAT "
                "for images 1.1"
            )
        names = _labels(file, top)
        images = top.findall("image")
        if not images:
            raise DataError(f"{file}: the file contains no images; export a task with images")
        for found, kind in ((images, "image"), (top.findall("image/tag"), "tag")):
            if len(found) < sum(1 for _ in top.iter(kind)):
                raise DataError(f"{file}: unexpected element {kind!r}; export the file again")
        counts: Counter[str] = Counter()
        known = set(names)
        records = [self._record(image, f"{file}, image {k + 1}", known, counts) for k, image in enumerate(images)]
        said = [
            ("image", f"without a tag: {'unlabeled' if self._untagged == 'unlabeled' else 'shows nothing'}"),
            ("tag", "set by a model (source auto): read like the others"),
            ("attribute", "of tags: not read"),
            ("validation image", "by its subset: read with the training images"),
        ]
        notes = [f"{counted(counts[noun], noun)} {rest}" for noun, rest in said if counts[noun]]
        return Content(records, names, (), notes)

    def _record(self, image: Element, where: str, names: set[str], counts: Counter[str]) -> Record:
        name = image.get("name")
        if not name:
            raise DataError(f"{where}: the image has no name; export the file again")
        where = f"{where} ({brief(name)})"
        for child in image:
            if child.tag != "tag":
                raise DataError(
                    f"{where}: the image has a {brief(child.tag)}, but only tags label a whole image: export the task "
                    "in a COCO format and read that, or tag the images"
                )
            if child.get("label") not in names:
                raise DataError(
                    f"{where}: tag {brief(child.get('label'))} is not a label of the task that can be a tag"
                    f"{did_you_mean(child.get('label', ''), names)}; use the export of one task or project"
                )
        tags = [tag.get("label", "") for tag in image]
        counts["image"] += not tags
        counts["tag"] += sum(tag.get("source") in ("auto", "semi-auto") for tag in image)
        counts["attribute"] += sum(len(tag) for tag in image)
        subset = image.get("subset", "").strip().lower()
        counts["validation image"] += subset.startswith("val")
        answers = [tags] if tags or self._untagged == "nothing" else []
        return Record(name, where, answers, subset == "test")


def _labels(file: Path, top: Element) -> list[str]:
    """Returns the labels of the task, project or job that can be used as tags.

    Raises:
        DataError: If there are no such labels.
    """
    labels = [label for kind in _OF for label in top.findall(f"meta/{kind}/labels/label")]
    if not labels:
        raise DataError(f"{file}: its meta has no labels of a {' or '.join(_OF)}; export it as CVAT for images 1.1")
    names = [label.findtext("name", "") for label in labels if label.findtext("type", "").strip() in _TAG_TYPES]
    if not names:
        kinds = sorted({label.findtext("type", "").strip() for label in labels})
        raise DataError(
            f"{file}: the labels have type {', '.join(map(brief, kinds))}, and none is a tag; use a task with tags"
        )
    return names
