"""PASCAL VOC, with image-level labels from ``ImageSets/Main``."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from cbsa_lightning.arguments import check_choice, check_flags, check_paths
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import prompts_from
from cbsa_lightning.data.readers.source import Source, read_lines, refuse_repeated, tidy_paths
from cbsa_lightning.data.readers.voc_xml import classes_of, has_own_classes, read_voc_xml
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

_NAMES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
VOC_CLASSES = tuple(_NAMES.split())
ARCHIVES = {
    "2012": "VOCtrainval_11-May-2012.tar",
    "2007": "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar",
}
DIFFICULT = {"negative": 0, "positive": 1, "ignore": -1}


@dataclass(frozen=True)
class VOC(Source):
    """PASCAL VOC 2012 or 2007.

    In VOC 2012, there are 5,717 training images and 5,823 test images (val). In VOC 2007, there are 5,011 training
    images (trainval) and 4,952 test images.

    If a folder has XML files and lists of images, but not VOC's lists for each class, it is read as a custom data set
    in the layout of VOC. Its classes are those in the XML files; see :func:`~.voc_xml.read_voc_xml`.

    An image is listed if at least one class has flag 1. File names are sorted. The splits of the paper depend on this
    order.

    Args:
        root: Folder that contains ``VOCdevkit``.
        year: "2012" or "2007".
        difficult: Label of a class if all its instances in an image are marked as difficult (flag 0): "negative" as in
            CAP, "positive" as in SCPNet's lists, or "ignore" (unknown).
        download: Whether to download missing archives with torchvision.
        class_file: Class file with prompt names (see ``read_class_file``). Defaults to the official names.

    Raises:
        ConfigError: If ``year`` or ``difficult`` is unknown, or an argument has the wrong type.
    """

    root: str
    _: KW_ONLY
    year: Literal["2012", "2007"] = "2012"
    difficult: Literal["negative", "positive", "ignore"] = "negative"
    download: bool = False
    class_file: str | None = None

    def __post_init__(self) -> None:
        check_paths(**{"VOC: root": self.root, "VOC: class_file": self.class_file})
        check_choice("VOC: year", self.year, tuple(ARCHIVES))
        check_choice("VOC: difficult", self.difficult, tuple(DIFFICULT))
        check_flags(**{"VOC: download": self.download})

    @property
    def class_names(self) -> tuple[str, ...]:
        """The 20 official names in alphabetical order, or the names in custom XML files."""
        return self._own_classes if self._own else VOC_CLASSES

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The official names, or the prompt names of the class file."""
        return prompts_from(self.class_file, self.class_names)

    @property
    def _image_sets(self) -> tuple[str, str]:
        return ("train", "val") if self.year == "2012" else ("trainval", "test")

    @property
    def _own(self) -> bool:
        return has_own_classes(self._folder, self._image_sets[0])

    @cached_property
    def _own_classes(self) -> tuple[str, ...]:
        """Classes in custom XML files. They are cached, since determining them requires reading all files."""
        return classes_of(self._folder, self._own_sets)

    @property
    def _own_sets(self) -> tuple[str, ...]:
        lists = self._folder / "ImageSets" / "Main"
        return tuple(name for name in self._image_sets if (lists / f"{name}.txt").is_file())

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "VOCdevkit" / f"VOC{self.year}"

    def prepare(self) -> None:
        """Downloads missing files if requested, and checks that all files exist.

        Raises:
            DataError: If files are missing or the download fails.
        """
        if self._own:
            return
        if self.download and self._missing():
            self._fetch()
        if missing := self._missing():
            raise DataError(
                f"PASCAL VOC {self.year} is not complete under {self._folder}: no {listed(missing)}. Download "
                f"{ARCHIVES[self.year]} from the PASCAL VOC website (or set download: true) and unpack it in "
                f"{self.root}, so that {self._folder / 'JPEGImages'} exists"
            )

    def train(self) -> AnnotationTable:
        """Returns images and labels of train (trainval for 2007)."""
        return self._read(self._image_sets[0])

    def test(self) -> AnnotationTable | None:
        """Returns images and labels of val (test for 2007), or None if custom data does not have this list."""
        if self._own and self._image_sets[1] not in self._own_sets:
            return None
        return self._read(self._image_sets[1])

    def _missing(self) -> list[str]:
        wanted = ["JPEGImages"]
        wanted += [f"ImageSets/Main/{name}_{part}.txt" for part in self._image_sets for name in VOC_CLASSES]
        return [path for path in wanted if not os.path.exists(self._folder / path)]

    def _fetch(self) -> None:
        from torchvision.datasets import VOCDetection  # imported here because it is slow to import and rarely needed

        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            for image_set in ("train",) if self.year == "2012" else self._image_sets:
                VOCDetection(self.root, year=self.year, image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"PASCAL VOC {self.year}: the download into {self.root} failed ({error}); download "
                f"{ARCHIVES[self.year]} manually and unpack it there"
            ) from error

    def _read(self, image_set: str) -> AnnotationTable:
        difficult = DIFFICULT[self.difficult]
        if self._own:
            return read_voc_xml(self._folder, image_set, self.class_names, difficult, self.prompt_names)
        return read_voc(self._folder, image_set, difficult, self.prompt_names)


def read_voc(
    folder: str | Path,
    image_set: str,
    difficult: int = 0,
    prompt_names: tuple[str, ...] = (),
) -> AnnotationTable:
    """Reads ``ImageSets/Main/<class>_<image_set>.txt`` for the 20 classes.

    Args:
        folder: ``VOCdevkit/VOC<year>``.
        image_set: "train", "val", "trainval" or "test".
        difficult: Label for flag 0: 0, 1 or -1.
        prompt_names: The 20 prompt names, or empty for the official names.

    Raises:
        DataError: If a file is missing, a line does not consist of an image and a flag, a flag is not 1, 0 or -1, an
            image occurs twice, or two classes list different images.
    """
    folder = Path(folder)
    columns: list[dict[str, int]] = []
    for name in VOC_CLASSES:
        file = folder / "ImageSets" / "Main" / f"{name}_{image_set}.txt"
        columns.append(_read_flags(file))
        if columns[-1].keys() != columns[0].keys():
            differing = sorted(columns[-1].keys() ^ columns[0].keys())
            raise DataError(
                f"{file} and {VOC_CLASSES[0]}_{image_set}.txt do not contain the same images; only one of them "
                f"has {listed(map(_cut, differing))}; unpack the archive again"
            )
    images = sorted(columns[0])
    flags = np.array([[column[image] for column in columns] for image in images], dtype=np.int8)
    flags = flags.reshape(len(images), len(VOC_CLASSES))
    labels = np.select([flags == 1, flags == 0], [1, difficult], 0).astype(np.int8)
    listed_images = (flags == 1).any(axis=1)  # uses the raw flags, so that the list does not depend on `difficult`
    first = folder / "ImageSets" / "Main" / f"{VOC_CLASSES[0]}_{image_set}.txt"
    if not listed_images.any():
        raise DataError(
            f"{first} and the files of the other classes have no image with flag 1; unpack the archive again"
        )

    def where(i: int) -> str:
        return f"{first}, image {brief(images[i])}"

    paths = tidy_paths(folder, folder, [f"JPEGImages/{image}.jpg" for image in images], where)
    refuse_repeated(paths, where)
    return AnnotationTable(folder, paths[listed_images], labels[listed_images], VOC_CLASSES, prompt_names)


def _read_flags(file: Path) -> dict[str, int]:
    flags: dict[str, int] = {}
    for number, line in enumerate(read_lines(file, "unpack the PASCAL VOC archive again"), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or parts[1] not in ("1", "0", "-1"):
            raise DataError(
                f"{file}, line {number}: {brief(line)} is not an image name and flag (1, 0 or -1); correct it"
            )
        if parts[0] in flags:
            raise DataError(f"{file}, line {number}: image {brief(parts[0])} is listed twice; keep one line")
        flags[parts[0]] = int(parts[1])
    return flags


def _cut(name: str) -> str:
    """Returns the name of an image for an error message, truncated if it is very long."""
    return name if len(name) <= 100 else brief(name, 100)
