"""PASCAL VOC: image-level labels from ``ImageSets/Main``."""

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
    """PASCAL VOC 2012 (train 5,717 images, test = val, 5,823) or 2007 (trainval 5,011, test 4,952).

    A folder with XML files and lists of images, but without VOC's lists of each class, is read as a custom data set in
    VOC's layout. Its classes are those in the XML files; see :func:`~.voc_xml.read_voc_xml`.

    An image is listed if at least one class has flag 1. File names are sorted; the paper's splits depend on this order.

    Args:
        root: Folder that contains ``VOCdevkit``.
        year: "2012" or "2007".
        difficult: Label of a class if all its instances in an image are marked difficult (flag 0): "negative" as in
            CAP, "positive" as in SCPNet's lists, or "ignore" (unknown).
        download: Whether to download missing archives with torchvision.
        class_file: Class file with prompt names (``read_class_file``); default: the official names.

    Raises:
        ConfigError: If year or difficult is unknown, or an argument has the wrong type.
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
        """The 20 official names, alphabetical; or the names in custom XML files."""
        return self._own_classes if self._own else VOC_CLASSES

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The official names, or those of the class file."""
        return prompts_from(self.class_file, self.class_names)

    @property
    def _image_sets(self) -> tuple[str, str]:
        return ("train", "val") if self.year == "2012" else ("trainval", "test")

    @property
    def _own(self) -> bool:
        return has_own_classes(self._folder, self._image_sets[0])

    @cached_property
    def _own_classes(self) -> tuple[str, ...]:
        """Classes of custom XML files; cached, since names are accessed often and require reading all files."""
        return classes_of(self._folder, self._own_sets)

    @property
    def _own_sets(self) -> tuple[str, ...]:
        lists = self._folder / "ImageSets" / "Main"
        return tuple(name for name in self._image_sets if (lists / f"{name}.txt").is_file())

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "VOCdevkit" / f"VOC{self.year}"

    def prepare(self) -> None:
        """Downloads missing files if requested, then checks that all files exist.

        Raises:
            DataError: If files are missing, or the download fails.
        """
        if self._own:
            return
        if self.download and self._missing():
            self._fetch()
        if missing := self._missing():
            raise DataError(
                f"PASCAL VOC {self.year} is not complete under {self._folder}: no {listed(missing)}. Get "
                f"{ARCHIVES[self.year]} from the PASCAL VOC pages (or set download: true) and unpack it in "
                f"{self.root}, so that {self._folder / 'JPEGImages'} exists"
            )

    def train(self) -> AnnotationTable:
        """Returns images and labels of train (2007: trainval)."""
        return self._read(self._image_sets[0])

    def test(self) -> AnnotationTable | None:
        """Returns images and labels of val (2007: test); None if custom data has no such list."""
        if self._own and self._image_sets[1] not in self._own_sets:
            return None
        return self._read(self._image_sets[1])

    def _missing(self) -> list[str]:
        wanted = ["JPEGImages"]
        wanted += [f"ImageSets/Main/{name}_{part}.txt" for part in self._image_sets for name in VOC_CLASSES]
        return [path for path in wanted if not os.path.exists(self._folder / path)]

    def _fetch(self) -> None:
        from torchvision.datasets import VOCDetection  # slow to import, and rarely needed

        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            for image_set in ("train",) if self.year == "2012" else self._image_sets:
                VOCDetection(self.root, year=self.year, image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"PASCAL VOC {self.year}: the download into {self.root} failed ({error}); fetch "
                f"{ARCHIVES[self.year]} by hand and unpack it there"
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
    """Reads ``ImageSets/Main/<class>_<image_set>.txt`` of the 20 classes.

    Args:
        folder: ``VOCdevkit/VOC<year>``.
        image_set: "train", "val", "trainval" or "test".
        difficult: Label for flag 0: 0, 1 or -1.
        prompt_names: 20 prompt names; empty for the official ones.

    Raises:
        DataError: If a file is missing, a line is not an "image flag" pair, a flag is not 1, 0 or -1, an image
            occurs twice, or two classes list different images.
    """
    folder = Path(folder)
    columns: list[dict[str, int]] = []
    for name in VOC_CLASSES:
        file = folder / "ImageSets" / "Main" / f"{name}_{image_set}.txt"
        columns.append(_read_flags(file))
        if columns[-1].keys() != columns[0].keys():
            differing = sorted(columns[-1].keys() ^ columns[0].keys())
            raise DataError(
                f"{file} and {VOC_CLASSES[0]}_{image_set}.txt do not list the same images; only one of them "
                f"has {listed(map(_cut, differing))}; unpack the archive again"
            )
    images = sorted(columns[0])
    flags = np.array([[column[image] for column in columns] for image in images], dtype=np.int8)
    flags = flags.reshape(len(images), len(VOC_CLASSES))
    labels = np.select([flags == 1, flags == 0], [1, difficult], 0).astype(np.int8)
    listed_images = (flags == 1).any(axis=1)  # from the raw flags, so that the list does not depend on `difficult`
    first = folder / "ImageSets" / "Main" / f"{VOC_CLASSES[0]}_{image_set}.txt"
    if not listed_images.any():
        raise DataError(f"{first} and those of the other classes have no image with flag 1; unpack the archive again")

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
    """Returns an image's name for a message, cut if it is too long to be a name."""
    return name if len(name) <= 100 else brief(name, 100)
