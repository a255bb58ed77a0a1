"""Data sets of FiftyOne in the format FiftyOneImageClassificationDataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbsa_lightning.data.readers.answers import Record
from cbsa_lightning.data.readers.exports import Content, Export
from cbsa_lightning.data.readers.structured import counted, field, read_json, typed
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief


class FiftyOne(Export):
    """A FiftyOneImageClassificationDataset, which consists of ``labels.json`` and a folder ``data`` of images.

    The classifications of an image are its classes, and all other classes are absent. An empty list means that the
    image shows no class, and ``null`` means that it is unlabeled. The exporter of FiftyOne writes ``null`` in both
    cases.

    The keys of ``labels.json`` are paths below ``root`` without suffix. To determine the suffix, the images must exist.

    Args:
        train: File ``labels.json`` of the training images.
        test: File ``labels.json`` of the test images.
        root: Folder that contains the images. Defaults to the folder ``data`` next to each file.
        class_file: Class file with prompt names (see ``read_class_file``).
        nothing: Labels that mean "shows no class". They are not classes.

    Raises:
        ConfigError: If an argument has the wrong type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_file: str | None = None,
        nothing: Sequence[str] = (),
    ) -> None:
        super().__init__(train, test, root, class_file, nothing)

    def _root_of(self, path: str) -> Path:
        return Path(path).parent / "data" if self._root is None else Path(self._root)

    def _load(self, file: Path, root: Path) -> Content:
        content = typed(read_json(file), (dict,), f"{file}: a dataset")
        labels = field(content, "labels", (dict,), str(file))
        if not labels:
            raise DataError(f"{file}: labels is empty; export some images")
        classes = field(content, "classes", (list, type(None)), str(file), None)
        for name in classes or ():
            typed(name, (str,), f"{file}: a class")
        counts: Counter[str] = Counter()
        answers = [_answers(value, classes, f"{file}, {brief(key)}", counts) for key, value in labels.items()]
        paths, left = _match(file, root, list(labels))
        records = [
            Record(path, f"{file}, {brief(key)}", found)
            for path, key, found in zip(paths, labels, answers, strict=True)
        ]
        said = {"image": "without a label (null): unlabeled", "label": "with a confidence or attributes: not read"}
        notes = [f"{counted(counts[noun], noun)} {rest}" for noun, rest in said.items() if counts[noun]]
        if left:
            notes.append(f"{counted(left, 'image')} below {root} without a key: omitted")
        return Content(records, classes, (), notes)


def _answers(value: Any, classes: list[str] | None, where: str, counts: Counter[str]) -> list[list[str]]:
    """Returns the answers for an image. Null has no answers. A single classification is treated as a list."""
    if value is None:
        counts["image"] += 1
        return []
    found = []
    for label in value if isinstance(value, list) else [value]:
        if isinstance(label, dict):
            if more := sorted(label.keys() - {"label", "confidence", "attributes"}):
                raise DataError(
                    f"{where}: the image has {listed(map(brief, more))}, which is not a classification; export "
                    f"the field of "
                    "classifications as FiftyOneImageClassificationDataset"
                )
            counts["label"] += len(label) > 1
            label = field(label, "label", (int, str), where)
        typed(label, (int, str), f"{where}: a label")
        if isinstance(label, int):
            if classes is None or not 0 <= label < len(classes):
                raise DataError(f"{where}: label {label} is not an index of classes; correct it")
            label = classes[label]
        found.append(label)
    return [found]


def _match(file: Path, root: Path, keys: list[str]) -> tuple[list[str], int]:
    """Returns the image below ``root`` that belongs to each key, and the number of other images.

    Raises:
        DataError: If no image or several images belong to a key.
    """
    images: dict[str, list[str]] = {}
    for path in read_images(root, ("any",)).paths.tolist():
        images.setdefault(path[: -len(Path(path).suffix)], []).append(path)
    wrong = [
        f"{brief(key)} ({' and '.join(map(brief, images[key])) if key in images else 'no image'})"
        for key in keys
        if len(images.get(key, ())) != 1
    ]
    if wrong:
        raise DataError(
            f"{file}: each key without suffix must match exactly one image below {root}: {listed(wrong)}; put the "
            "images there, correct root, or rename images that differ only in their suffix"
        )
    return [images[key][0] for key in keys], sum(map(len, images.values())) - len(keys)
