"""NUS-WIDE with 81 concepts, read from the official files or from lists of images with a label matrix."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.arguments import check_choice, check_flags, check_paths
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import prompts_from
from cbsa_lightning.data.readers.source import Source, read_lines, refuse_repeated, tidy_paths
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, open_regular

_NAMES = """
    airport animal beach bear birds boats book bridge buildings cars castle cat cityscape clouds computer
    coral cow dancing dog earthquake elk fire fish flags flowers food fox frost garden glacier grass harbor
    horses house lake leaf map military moon mountain nighttime ocean person plane plants police protest
    railroad rainbow reflection road rocks running sand sign sky snow soccer sports statue street sun sunset
    surf swimmers tattoo temple tiger tower town toy train tree valley vehicle water waterfall wedding whales
    window zebra
"""
NUSWIDE_CLASSES = tuple(_NAMES.split())  # in alphabetical order, as in Concepts81.txt
_REMEDY = "download the image lists and ground truth from the NUS-WIDE website and unpack them into this folder"
_OFFICIAL = "ImageList/{part}Imagelist.txt"
_CONCEPT = "TrainTestLabels/Labels_{concept}_{part}.txt"


@dataclass(frozen=True)
class NUSWIDE(Source):
    """NUS-WIDE with its 81 concepts. Scores on its different variants are not comparable.

    There are two layouts:

    - "official": ``ImageList/{Train,Test}Imagelist.txt`` contain paths with backslashes, and
      ``TrainTestLabels/Labels_<concept>_{Train,Test}.txt`` contain 0 or 1 on each line. There are 161,789 training and
      107,859 test images.
    - "list": For both train and val, there are a list of images and an (n, 81) label matrix of 0 and 1, as used by CAP
      and SPML. There are 150,000 and 60,260 images; the paper rounds the latter to 60,200. A ".npy" file is read
      without pickle. Other files are text files with one image per line, or 81 numbers per line that are separated by
      commas or white space.

    Args:
        root: Folder that the other paths are relative to.
        layout: "official" or "list".
        images: Folder that contains the images in the lists.
        train_images: List of the training images (layout "list").
        train_labels: Labels of the training images (layout "list").
        val_images: List of the test images (layout "list").
        val_labels: Labels of the test images (layout "list").
        drop_unlabeled: Whether to omit images without any concept (22 % of CAP's training list).
        class_file: Class file with prompt names (see ``read_class_file``). Defaults to the concept names.

    Raises:
        ConfigError: If the layout is unknown or an argument has the wrong type.
    """

    root: str
    _: KW_ONLY
    layout: Literal["official", "list"] = "official"
    images: str = "Flickr"
    train_images: str = "formatted_train_images.npy"
    train_labels: str = "formatted_train_labels.npy"
    val_images: str = "formatted_val_images.npy"
    val_labels: str = "formatted_val_labels.npy"
    drop_unlabeled: bool = False
    class_file: str | None = None

    def __post_init__(self) -> None:
        check_choice("NUSWIDE: layout", self.layout, ("official", "list"))
        check_flags(**{"NUSWIDE: drop_unlabeled": self.drop_unlabeled})
        others = {name: value for name, value in vars(self).items() if name not in ("layout", "drop_unlabeled")}
        check_paths(**{f"NUSWIDE: {name}": value for name, value in others.items()})

    @property
    def class_names(self) -> tuple[str, ...]:
        """The 81 concepts, alphabetical."""
        return NUSWIDE_CLASSES

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The names of the concepts, or the prompt names of the class file."""
        return prompts_from(self.class_file, NUSWIDE_CLASSES)

    def prepare(self) -> None:
        """Checks that the lists, the labels and the image folder exist.

        Raises:
            DataError: If some of them do not exist.
        """
        wanted = [self.images, *self._files("Train"), *self._files("Test")]
        if missing := [path for path in wanted if not os.path.exists(Path(self.root) / path)]:
            raise DataError(
                f"NUS-WIDE ({self.layout} layout) is not complete under {self.root}: no {listed(missing)}; "
                f"{_REMEDY}, or set layout and the file names according to your files"
            )

    def train(self) -> AnnotationTable:
        """Returns the training images."""
        return self._read("Train")

    def test(self) -> AnnotationTable:
        """Returns the test images."""
        return self._read("Test")

    def _files(self, part: str) -> list[str]:
        """Returns the image list and the label files."""
        if self.layout == "list":
            return [self.train_images, self.train_labels] if part == "Train" else [self.val_images, self.val_labels]
        concepts = [_CONCEPT.format(concept=name, part=part) for name in NUSWIDE_CLASSES]
        return [_OFFICIAL.format(part=part), *concepts]

    def _read(self, part: str) -> AnnotationTable:
        image_list, *label_files = [Path(self.root) / name for name in self._files(part)]
        names = _read_names(image_list)
        if self.layout == "list":
            labels = _read_matrix(label_files[0], len(names))
        else:
            columns = [_read_column(file, len(names), image_list) for file in label_files]
            labels = np.stack(columns, axis=1)
        folder = Path(self.root) / self.images

        def where(i: int) -> str:
            return f"{image_list}, image {i + 1}"

        paths = tidy_paths(self.root, folder, names, where)
        refuse_repeated(paths, where)
        table = AnnotationTable(Path(self.root), paths, labels, NUSWIDE_CLASSES, self.prompt_names)
        return table.select(np.flatnonzero((labels == 1).any(axis=1))) if self.drop_unlabeled else table


def _read_names(file: Path) -> list[str]:
    """Reads image names from a ".npy" array of strings, or from a text file with one name per line."""
    if file.suffix == ".npy":
        array = _load_array(file)
        if array.ndim != 1 or array.dtype.kind != "U":
            raise DataError(
                f"{file} has shape {array.shape} and type {array.dtype}, but must be a list of image names: "
                "save it with np.save(path, np.array(names, dtype=str))"
            )
        points = np.ascontiguousarray(array).view(f"{array.dtype.byteorder}u4").reshape(len(array), -1)
        # numpy does not check that strings in a file consist of valid characters.
        wrong = np.flatnonzero(((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any(axis=1))
        if len(wrong):
            raise DataError(f"{file}: the name of image {wrong[0] + 1} is not valid Unicode; save the list again")
        lines = [str(name) for name in array.tolist()]
    else:
        lines = [line.strip() for line in read_lines(file, _REMEDY)]
        while lines and not lines[-1]:
            lines.pop()
    if not lines:
        raise DataError(f"{file}: the file contains no images; {_REMEDY}")
    return lines


def _read_matrix(file: Path, num_images: int) -> NDArray[np.int8]:
    """Reads an (n, 81) label matrix of 0 and 1."""
    if file.suffix == ".npy":
        labels: NDArray[Any] = _load_array(file)
    else:
        lines = read_lines(file, _REMEDY)
        try:
            labels = np.loadtxt(lines, delimiter="," if lines and "," in lines[0] else None, ndmin=2)
        except ValueError as error:
            raise DataError(f"{file}: the file is not a table of numbers ({error}); correct it") from error
    expected = (num_images, len(NUSWIDE_CLASSES))
    if labels.shape != expected:
        raise DataError(
            f"{file}: labels have shape {labels.shape}, but the image list and the 81 concepts require "
            f"{expected}; use the label file that belongs to the list"
        )
    wrong = np.argwhere(~np.isin(labels, (0, 1)))
    if len(wrong):
        found = listed(f"{brief(labels[i, k].item())} (row {i + 1}, {NUSWIDE_CLASSES[k]!r})" for i, k in wrong)
        raise DataError(f"{file}: labels must be 0 or 1; found {found}; correct the file")
    return np.asarray(labels, dtype=np.int8)


def _read_column(file: Path, num_images: int, image_list: Path) -> NDArray[np.int8]:
    """Reads the labels of one concept from a file with 0 or 1 on each line."""
    values = [line.strip() for line in read_lines(file, _REMEDY)]
    while values and not values[-1]:
        values.pop()
    if len(values) != num_images:
        raise DataError(f"{file} has {len(values)} labels, but {image_list.name} lists {num_images} images; {_REMEDY}")
    if set(values) - {"0", "1"}:
        row = next(i for i, value in enumerate(values) if value not in ("0", "1"))
        raise DataError(f"{file}, line {row + 1}: {brief(values[row])} is neither 0 nor 1; correct it")
    return np.asarray(np.array(values) == "1", dtype=np.int8)


def _load_array(file: Path) -> NDArray[Any]:
    try:
        with open_regular(file) as stream:
            array: Any = np.lib.format.read_array(stream, allow_pickle=False)  # a pickle can execute arbitrary code
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {_REMEDY}, or set the file names according to your files") from None
    except DataError:
        raise
    # numpy parses the header as Python source, so a damaged file can raise almost any exception, such as SyntaxError.
    except Exception as error:
        raise DataError(
            f"{file} cannot be read as a plain array ({error}); object arrays are rejected because they "
            "are pickles. Save names as np.array(names, dtype=str), and labels as numbers"
        ) from error
    loaded: NDArray[Any] = array
    return loaded
