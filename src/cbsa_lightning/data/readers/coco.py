"""MS-COCO, with image-level labels that are derived from the instance annotations."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cbsa_lightning.arguments import check_choice, check_paths
from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable
from cbsa_lightning.data.class_names import ClassFile, check_prompt_names, prompts_from
from cbsa_lightning.data.readers.coco_file import peek_class_names, read_coco_file
from cbsa_lightning.data.readers.source import Source, refuse_repeated, tidy_paths
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

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
Unannotated = Literal["drop", "unlabeled", "empty"]
UNANNOTATED: tuple[Unannotated, ...] = ("drop", "unlabeled", "empty")
COCO_CLASSES = tuple(" ".join(_NAMES.split()).split(", "))


@dataclass(frozen=True)
class COCO(Source):
    """MS-COCO 2014, or any data set in its "instances" format.

    MS-COCO has 82,081 training images and 40,137 test images (val). Crowds count as annotations. Image ids are sorted
    as strings, as in CAP's lists. Classes are sorted by category id.

    Args:
        root: Folder that the other paths are relative to.
        year: Year in the default names of the annotation files, ``annotations/instances_{train,val}<year>.json``, and
            of the image folders, ``{train,val}<year>``.
        train_annotations: Custom annotation file for training.
        val_annotations: Custom annotation file for testing.
        train_images: Custom image folder for training.
        val_images: Custom image folder for testing.
        class_file: Class file with prompt names (see ``read_class_file``). Defaults to the category names.
        unannotated: Use of images without annotations: "drop" omits them, as in CAP's lists; "unlabeled" if they have
            not been labeled yet; "empty" if they show no class. Defaults to "unlabeled" for a custom annotation file,
            and to "drop" for COCO's own files.

    Raises:
        ConfigError: If an argument is not a string or path, or a choice is invalid.
    """

    root: str
    _: KW_ONLY
    year: str = "2014"
    train_annotations: str | None = None
    val_annotations: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    class_file: str | None = None
    unannotated: Unannotated | None = None

    def __post_init__(self) -> None:
        check_paths(**{f"COCO: {name}": value for name, value in vars(self).items() if name != "unannotated"})
        if self.unannotated is not None:
            check_choice("COCO: unannotated", self.unannotated, UNANNOTATED)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the categories, or the 80 names of COCO if the annotation file does not exist yet."""
        try:
            return peek_class_names(self._files("train")[0])
        except FileNotFoundError:
            return COCO_CLASSES

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The class names, or those of the class file."""
        return prompts_from(self.class_file, self.class_names)

    def prepare(self) -> None:
        """Checks that the annotation files and image folders exist.

        Raises:
            DataError: If some of them do not exist.
        """
        files = [path for part in ("train", "val") for path in self._files(part)]
        if missing := [str(path) for path in dict.fromkeys(files) if not os.path.exists(path)]:
            raise DataError(
                f"COCO is not complete under {self.root}: no {listed(missing)}. Download the {self.year} images "
                "and annotations of train and val from the COCO website and unpack them there, or set "
                "train_annotations, train_images, val_annotations and val_images"
            )

    def train(self) -> AnnotationTable:
        """Returns images and labels of the training file. See ``read_coco`` for errors."""
        return self._read("train")

    def test(self) -> AnnotationTable:
        """Returns images and labels of the validation file.

        Raises:
            DataError: If its classes differ from those of the training file. See also ``read_coco``.
        """
        return self._test(self.class_names, self._files("train")[0])

    def test_under(self, classes: ClassFile) -> AnnotationTable:
        """Returns images and labels of the validation file. Its categories must be the given classes."""
        return self._test(classes.class_names, classes.path)

    def _test(self, expected: tuple[str, ...], of: Path) -> AnnotationTable:
        table = self._read("val")
        if table.class_names != expected:
            differing = sorted(set(table.class_names) ^ set(expected)) or ["the order of their ids"]
            raise DataError(
                f"{self._files('val')[0]}: its categories are not those of {of}; they differ in {listed(differing)}; "
                "use files of one data set"
            )
        return table

    def _files(self, part: str) -> tuple[Path, Path]:
        """Returns the annotation file and image folder of "train" or "val"."""
        annotations = getattr(self, f"{part}_annotations") or f"annotations/instances_{part}{self.year}.json"
        images = getattr(self, f"{part}_images") or f"{part}{self.year}"
        return Path(self.root) / annotations, Path(self.root) / images

    def describe(self) -> list[str]:
        """Returns how many images in each file have no annotations, and how they are used."""
        notes: list[str] = []
        for part in ("train", "val"):
            self._read(part, notes)
        return notes

    def _read(self, part: str, notes: list[str] | None = None) -> AnnotationTable:
        own = getattr(self, f"{part}_annotations") is not None
        unannotated: Unannotated = self.unannotated or ("unlabeled" if own else "drop")
        files = self._files(part)
        return read_coco(*files, self.root, class_file=self.class_file, unannotated=unannotated, notes=notes)


def read_coco(
    annotations: str | Path,
    images: str | Path,
    root: str | Path | None = None,
    *,
    class_file: str | None = None,
    unannotated: Unannotated = "drop",
    notes: list[str] | None = None,
) -> AnnotationTable:
    """Reads an "instances" file.

    Args:
        annotations: Path of the JSON file.
        images: Folder that contains the images.
        root: Folder that the paths in the table are relative to. Defaults to ``images``.
        class_file: Class file with prompt names. Defaults to the category names.
        unannotated: Use of images without annotations: "drop" omits them, "unlabeled" keeps them as unlabeled images,
            and "empty" keeps them as images that show no class.
        notes: List to which a note on images without annotations is appended.

    Raises:
        DataError: If ``read_coco_file`` raises one, a file name occurs twice, no image is annotated, or two classes
            have the same prompt text.
    """
    file, images = Path(annotations), Path(images)
    root = Path(images if root is None else root)
    content = read_coco_file(file)
    prompts = prompts_from(class_file, content.class_names)
    prompts = check_prompt_names(content.class_names, prompts, f"{file}, categories")
    annotated = {image for image, _ in content.pairs}
    if not annotated:
        raise DataError(f"{file}: no image has an annotation; annotate some of them")
    ids = sorted(annotated if unannotated == "drop" else content.file_names, key=str)
    row = {image: i for i, image in enumerate(ids)}
    labels = np.zeros((len(ids), len(content.class_names)), dtype=np.int8)
    if unannotated == "unlabeled":
        labels[[i for i, image in enumerate(ids) if image not in annotated]] = UNKNOWN
    labels[[row[image] for image, _ in content.pairs], [k for _, k in content.pairs]] = 1
    if notes is not None and (without := len(content.file_names) - len(annotated)):
        kept = {"drop": "omitted", "unlabeled": "kept as unlabeled", "empty": "kept as images that show no class"}
        notes.append(
            f"{file}: {without:,} of {len(content.file_names):,} images have no annotation; {kept[unannotated]}"
        )

    def where(i: int) -> str:
        return f"{file}, image {brief(ids[i])}"

    paths = tidy_paths(root, images, [content.file_names[i] for i in ids], where)
    refuse_repeated(paths, where)
    return AnnotationTable(root, paths, labels, content.class_names, prompts)
