"""MS-COCO: image-level labels from the instance annotations."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbsa_lightning.arguments import check_paths
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import check_class_names, duplicates, prompts_from
from cbsa_lightning.data.readers.source import Source, refuse_repeated, tidy_paths
from cbsa_lightning.data.reading import brief, open_regular, read_text, refuse_larger_than_memory
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

    Raises:
        ConfigError: An argument that is no text or path.
    """

    root: str
    _: KW_ONLY
    year: str = "2014"
    train_annotations: str | None = None
    val_annotations: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    class_file: str | None = None

    def __post_init__(self) -> None:
        check_paths(**{f"COCO: {name}": value for name, value in vars(self).items()})

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the categories; before the annotation file is there, the 80 of COCO."""
        try:
            return _peek_class_names(self._files("train")[0])
        except FileNotFoundError:
            return COCO_CLASSES

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
        if missing := [str(path) for path in dict.fromkeys(files) if not os.path.exists(path)]:
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
        DataError: The file is missing, malformed or too large for memory; there are no categories; an image id,
            category id or file name occurs twice or is of another type; an annotation belongs to an unknown image or
            category; no image is annotated.
    """
    file, images = Path(annotations), Path(images)
    root = Path(images if root is None else root)
    content = _load(file)
    position, class_names = _classes(content["categories"], file)
    found = _fields(content["images"], {"id": _ID, "file_name": (str,)}, file, "images")
    _refuse_twice([str(number) for number, _ in found], file, "images", "id")
    names = dict(found)

    pairs = _fields(content["annotations"], {"image_id": _ID, "category_id": (int,)}, file, "annotations")
    for i, (image, category) in enumerate(pairs):
        if image not in names or category not in position:
            what = f"image {brief(image)}" if image not in names else f"category {brief(category)}"
            raise DataError(f"{file}, annotations[{i}]: {what} is not in the file; correct or remove it")
    ids = sorted({image for image, _ in pairs}, key=str)
    if not ids:
        raise DataError(f"{file}: no image has an annotation; annotate some")
    row = {image: i for i, image in enumerate(ids)}
    labels = np.zeros((len(ids), len(class_names)), dtype=np.int8)
    labels[[row[image] for image, _ in pairs], [position[category] for _, category in pairs]] = 1

    def where(i: int) -> str:
        return f"{file}, image {brief(ids[i])}"

    paths = tidy_paths(root, images, [names[i] for i in ids], where)
    refuse_repeated(paths, where)
    return AnnotationTable(root, paths, labels, class_names)


def _load(file: Path) -> dict[str, Any]:
    try:
        # Outlines are most of the file and no label: dropped as they are parsed, they take no memory.
        content = json.loads(read_text(file), object_pairs_hook=_without_outline)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; get the COCO annotations, or correct the path") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "it does not fit into memory"
        raise DataError(f"{file} cannot be read as JSON ({reason}); get it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file} has no list {key!r}; it must be a COCO instances file")
    return dict(content)


_ID = (int, str)  # COCO's own are whole numbers; other data sets name their images
_KEYS = {"images", "annotations", "categories", "id", "file_name", "name", "image_id", "category_id"}


def _without_outline(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        if twice := [key for k, key in enumerate(keys) if key in _KEYS and key in keys[:k]]:
            raise ValueError(f"the key {twice[0]!r} stands twice in one record, and only one of them can count")
    record.pop("segmentation", None)
    return record


def _fields(records: list[Any], kinds: dict[str, tuple[type, ...]], file: Path, kind: str) -> list[tuple[Any, Any]]:
    """Two fields of each record, of the types that they must have; True is no number here, though Python calls it 1."""
    (first, first_types), (second, second_types) = kinds.items()
    try:
        pairs = [(record[first], record[second]) for record in records]
    except (KeyError, TypeError, IndexError):
        pairs = []
    if len(pairs) == len(records) and all(type(a) in first_types and type(b) in second_types for a, b in pairs):
        return pairs
    for i, record in enumerate(records):
        absent = [key for key in kinds if not isinstance(record, dict) or key not in record]
        if absent:
            raise DataError(f"{file}, {kind}[{i}] has no {listed(absent)}; add it")
        for key, types in kinds.items():
            if type(record[key]) not in types:
                wanted = " or ".join({int: "a whole number", str: "a text"}[t] for t in types)
                raise DataError(f"{file}, {kind}[{i}]: {key} must be {wanted}, found {brief(record[key])}; correct it")
    raise AssertionError("one of the records is at fault")


def _classes(categories: list[Any], file: Path) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Category id -> class index, and the names, by ascending id."""
    if not categories:
        raise DataError(f"{file}: categories is empty; a class needs an id and a name there")
    pairs = _fields(categories, {"id": (int,), "name": (str,)}, file, "categories")
    _refuse_twice([str(number) for number, _ in pairs], file, "categories", "id")
    _refuse_twice([name for _, name in pairs], file, "categories", "name")
    pairs.sort()
    return {number: k for k, (number, _) in enumerate(pairs)}, check_class_names(
        [name for _, name in pairs], f"{file}, categories"
    )


def _refuse_twice(values: list[str], file: Path, kind: str, what: str) -> None:
    if pairs := duplicates(values):
        found = listed(f"{brief(values[i])} ({kind}[{i}] and {kind}[{j}])" for i, j in pairs)
        raise DataError(f"{file}: the same {what} twice: {found}; keep one")


def _peek_class_names(file: Path) -> tuple[str, ...]:
    """Class names without parsing the whole file (330 MB for COCO train, where they stand at the end).

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It is no COCO file.
    """
    try:
        with open_regular(file) as stream:
            refuse_larger_than_memory(file, os.fstat(stream.fileno()).st_size)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = content.rfind(b'"categories"')
                tail = content[start:].decode("utf-8", "replace") if start >= 0 else ""
        categories, _ = json.JSONDecoder().raw_decode(tail.partition(":")[2].lstrip())
        return _classes(categories, file)[1]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError):  # nothing is said before the whole file has been read
        return _classes(_load(file)["categories"], file)[1]
