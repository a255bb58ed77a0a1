"""Reading of folders in the layout of VOC with custom classes, which are written by labeling tools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable
from cbsa_lightning.data.readers.source import read_lines, refuse_repeated, tidy_paths
from cbsa_lightning.data.readers.structured import parse_xml
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text


def has_own_classes(folder: Path, image_set: str) -> bool:
    """Returns whether ``folder`` has lists of images and XML files, but not VOC's lists for each class."""
    lists = folder / "ImageSets" / "Main"
    named = os.path.isfile(lists / f"{image_set}.txt") and os.path.isdir(folder / "Annotations")
    return named and not any(lists.glob(f"*_{image_set}.txt"))


def classes_of(folder: Path, image_sets: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted names of all objects in the XML files of the given image sets.

    Raises:
        DataError: If a file cannot be read, or no object has a name.
    """
    names = {
        name
        for image_set in image_sets
        for image in _images(folder, image_set)
        for name in _objects(folder, image) or ()
    }
    if not names:
        raise DataError(f"{folder / 'Annotations'}: no XML file contains an object; label some images first.")
    return tuple(sorted(names))


def read_voc_xml(
    folder: Path, image_set: str, class_names: Sequence[str], difficult: int = 0, prompt_names: Sequence[str] = ()
) -> AnnotationTable:
    """Reads the XML files of an image set.

    If an image has no XML file, it is unlabeled. If its file contains no objects, it shows no class. ``difficult``,
    ``pose`` and ``truncated`` may be missing, as in the files of labelImg and CVAT.

    Args:
        folder: Folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        image_set: Name of the list, without ``.txt``.
        class_names: The C class names.
        difficult: Label of a class if all its objects in an image are marked as difficult: 0, 1 or -1.
        prompt_names: The C prompt names, or empty for the default names.

    Raises:
        DataError: If a file is missing, is not XML or has another structure, or an image is listed twice.
    """
    images = _images(folder, image_set)
    row_of = {name: k for k, name in enumerate(class_names)}
    labels = np.full((len(images), len(class_names)), UNKNOWN, dtype=np.int8)
    for i, image in enumerate(images):
        objects = _objects(folder, image)
        if objects is None:
            continue
        labels[i] = 0
        for name, clear in objects.items():
            labels[i, row_of[name]] = 1 if clear else difficult
    try:
        there = {Path(name).stem: name for name in sorted(os.listdir(folder / "JPEGImages"), reverse=True)}
    except OSError as error:
        raise DataError(
            f"{folder / 'JPEGImages'}: the folder cannot be listed ({error.strerror}); put the images there"
        ) from error

    def where(i: int) -> str:
        return f"{_list(folder, image_set)}, image {brief(images[i])}"

    names = [f"JPEGImages/{there.get(image, f'{image}.jpg')}" for image in images]
    paths = tidy_paths(folder, folder, names, where)
    refuse_repeated(paths, where)
    return AnnotationTable(folder, paths, labels, tuple(class_names), tuple(prompt_names))


def _list(folder: Path, image_set: str) -> Path:
    return folder / "ImageSets" / "Main" / f"{image_set}.txt"


def _images(folder: Path, image_set: str) -> list[str]:
    """Returns the names in an image set without suffixes and folders, which some tools write."""
    lines = read_lines(_list(folder, image_set), "write one image name per line")
    images = [Path(line.strip()) for line in lines if line.strip()]
    if not images:
        raise DataError(f"{_list(folder, image_set)}: the file contains no names; write one image name per line")
    return [image.stem if image.suffix.lower() in (".jpg", ".jpeg", ".png") else image.name for image in images]


def _objects(folder: Path, image: str) -> dict[str, bool] | None:
    """Maps each class of an image to whether one of its objects is not difficult. None if there is no file."""
    file = folder / "Annotations" / f"{image}.xml"
    try:
        text = read_text(file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); save the file as UTF-8") from error
    root = parse_xml(text, file)
    objects: dict[str, bool] = {}
    for k, entry in enumerate(root.iter("object")):
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{file}: object {k} has no name; name it, or remove it")
        clear = (entry.findtext("difficult") or "0").strip().lower() not in ("1", "true")
        objects[name] = objects.get(name, False) or clear
    return objects
