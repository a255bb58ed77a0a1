"""MS-COCO: image-level labels from the instance annotations."""

from __future__ import annotations

import json
import mmap
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import duplicates, prompts_from
from cbsa_lightning.data.readers.source import Source, tidy_paths
from cbsa_lightning.errors import DataError, listed

_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
    hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
    zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
    ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
    glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
    dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
"""
COCO_CLASSES = tuple(" ".join(_NAMES.split()).split(", "))


@dataclass(frozen=True)
class COCO(Source):
    """MS-COCO 2014 (train 82,081 images, test = val, 40,137), or any data set in its "instances" format.

    An image is listed if it has at least one annotation, crowds included. Image ids are ordered as strings,
    as in CAP's lists; classes are ordered by ascending category id.

    Args:
        root: Folder that the other paths are relative to.
        year: Stands in the default file names: ``annotations/instances_{train,val}<year>.json``, and
            ``{train,val}<year>`` for the images.
        train_annotations: Another annotation file for training.
        val_annotations: Another annotation file for the test.
        train_images: Another image folder for training.
        val_images: Another image folder for the test.
        class_file: Class file with prompt names (``read_class_file``); default: the category names.
    """

    root: str
    _: KW_ONLY
    year: str = "2014"
    train_annotations: str | None = None
    val_annotations: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    class_file: str | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the categories; before the annotation file is there, the 80 of COCO."""
        file = self._files("train")[0]
        return _peek_class_names(file) if file.is_file() else COCO_CLASSES

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The class names, or those of the class file."""
        return prompts_from(self.class_file, self.class_names)

    def prepare(self) -> None:
        """Checks that annotation files and image folders are there.

        Raises:
            DataError: Some are not.
        """
        files = [path for part in ("train", "val") for path in self._files(part)]
        if missing := [str(path) for path in dict.fromkeys(files) if not path.exists()]:
            raise DataError(
                f"COCO is not complete under {self.root}: no {listed(missing)}. Get the {self.year} images "
                "and annotations of train and val from the COCO pages and unpack them there, or say where "
                "they are with train_annotations, train_images, val_annotations and val_images"
            )

    def train(self) -> AnnotationTable:
        """Images and labels of the training file."""
        return self._read("train")

    def test(self) -> AnnotationTable:
        """Images and labels of the validation file.

        Raises:
            DataError: Its classes are not those of the training file; see also ``read_coco``.
        """
        table, expected = self._read("val"), self.class_names
        if table.class_names != expected:
            differing = sorted(set(table.class_names) ^ set(expected)) or ["the order of their ids"]
            raise DataError(
                f"{self._files('val')[0]}: its categories are not those of {self._files('train')[0]}; "
                f"they differ in {listed(differing)}; use files of one data set"
            )
        return table

    def _files(self, part: str) -> tuple[Path, Path]:
        """Annotation file and image folder of "train" or "val"."""
        annotations = getattr(self, f"{part}_annotations") or f"annotations/instances_{part}{self.year}.json"
        images = getattr(self, f"{part}_images") or f"{part}{self.year}"
        return Path(self.root) / annotations, Path(self.root) / images

    def _read(self, part: str) -> AnnotationTable:
        table = read_coco(*self._files(part), root=self.root)
        prompts = prompts_from(self.class_file, table.class_names)
        return AnnotationTable(table.root, table.paths, table.labels, table.class_names, prompts)


def read_coco(annotations: str | Path, images: str | Path, root: str | Path | None = None) -> AnnotationTable:
    """Reads an "instances" file.

    Args:
        annotations: The JSON file.
        images: Folder of the images.
        root: Folder that the table's paths are relative to; default: ``images``.

    Raises:
        DataError: The file is missing or malformed; there are no categories; an image id, category id or file
            name occurs twice; an annotation belongs to an unknown image or category; no image is annotated.
    """
    file, images = Path(annotations), Path(images)
    root = Path(images if root is None else root)
    content = _load(file)
    position, class_names = _classes(content["categories"], file)
    names = dict(_fields(content["images"], ("id", "file_name"), file, "images"))
    _refuse_twice([str(record["id"]) for record in content["images"]], file, "images", "id")

    pairs = _fields(content["annotations"], ("image_id", "category_id"), file, "annotations")
    for i, (image, category) in enumerate(pairs):
        if image not in names or category not in position:
            what = f"image {image!r}" if image not in names else f"category {category!r}"
            raise DataError(f"{file}, annotations[{i}]: {what} is not in the file; correct or remove it")
    ids = sorted({image for image, _ in pairs}, key=str)
    if not ids:
        raise DataError(f"{file}: no image has an annotation; annotate some")
    row = {image: i for i, image in enumerate(ids)}
    labels = np.zeros((len(ids), len(class_names)), dtype=np.int8)
    labels[[row[image] for image, _ in pairs], [position[category] for _, category in pairs]] = 1
    paths = tidy_paths(root, images, [names[i] for i in ids], lambda i: f"{file}, image {ids[i]!r}")
    return AnnotationTable(root, paths, labels, class_names)


def _load(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            # Outlines are most of the file and no label: dropped as they are parsed, they take no memory.
            content = json.load(stream, object_hook=_without_outline)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; get the COCO annotations, or correct the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}); get it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file} has no list {key!r}; it must be a COCO instances file")
    return dict(content)


def _without_outline(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def _fields(records: list[Any], keys: tuple[str, str], file: Path, kind: str) -> list[tuple[Any, Any]]:
    try:
        return [(record[keys[0]], record[keys[1]]) for record in records]
    except (KeyError, TypeError):
        for i, record in enumerate(records):
            absent = [key for key in keys if not isinstance(record, dict) or key not in record]
            if absent:
                raise DataError(f"{file}, {kind}[{i}] has no {listed(absent)}; add it") from None
        raise


def _classes(categories: list[Any], file: Path) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Category id -> class index, and the names, by ascending id."""
    if not categories:
        raise DataError(f"{file}: categories is empty; a class needs an id and a name there")
    pairs = _fields(categories, ("id", "name"), file, "categories")
    _refuse_twice([str(number) for number, _ in pairs], file, "categories", "id")
    _refuse_twice([str(name) for _, name in pairs], file, "categories", "name")
    if wrong := [number for number, _ in pairs if type(number) is not int]:
        raise DataError(f"{file}: category ids must be whole numbers; found {listed(map(repr, wrong))}")
    pairs.sort()
    return {number: k for k, (number, _) in enumerate(pairs)}, tuple(str(name) for _, name in pairs)


def _refuse_twice(values: list[str], file: Path, kind: str, what: str) -> None:
    if pairs := duplicates(values):
        found = listed(f"{values[i]!r} ({kind}[{i}] and {kind}[{j}])" for i, j in pairs)
        raise DataError(f"{file}: the same {what} twice: {found}; keep one")


def _peek_class_names(file: Path) -> tuple[str, ...]:
    """Class names without parsing the whole file (330 MB for COCO train, where they stand at the end)."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.rfind(b'"categories"')
        tail = content[start:].decode("utf-8", "replace") if start >= 0 else ""
    try:
        categories, _ = json.JSONDecoder().raw_decode(tail.partition(":")[2].lstrip())
        return _classes(categories, file)[1]
    except (ValueError, TypeError, DataError):
        return _classes(_load(file)["categories"], file)[1]
