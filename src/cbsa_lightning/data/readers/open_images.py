"""Open Images, with human-verified positive and negative labels of whole images."""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cbsa_lightning.arguments import check_kind, check_paths
from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable
from cbsa_lightning.data.class_names import (
    ClassFile,
    check_class_names,
    check_prompt_names,
    default_prompts,
    read_class_file,
)
from cbsa_lightning.data.readers.columns import Columns, read_columns
from cbsa_lightning.data.readers.source import Source, read_lines, refuse_repeated, require_named, tidy_paths
from cbsa_lightning.data.readers.structured import counted
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.reading import brief, memory_of_machine

_HEADER = ["LabelName", "DisplayName"]


class OpenImages(Source):
    """Human-verified image labels in the CSV format of Open Images (``ImageID, Source, LabelName, Confidence``).

    A confidence of 1 means present and 0 means absent. Any other confidence was predicted by a model, and the class is
    unknown. A class without a row is also unknown, and so is a class whose rows for an image contradict each other.

    Args:
        train: Label file of the training images.
        test: Label file of the test images.
        root: Folder that contains the images. Defaults to the folder that contains each label file.
        class_descriptions: CSV file of label names and class names. Rows of other labels are omitted. Defaults to the
            label names in the training file.
        train_images: CSV file with a column named ``ImageID`` that lists all training images. Images without a label
            row are unlabeled. Defaults to the images in ``train``.
        test_images: The same for the test images.
        suffix: Suffix that is appended to the image id to obtain the file name.
        class_file: Class file with prompt names (see ``read_class_file``).

    Raises:
        ConfigError: If an argument has the wrong type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_descriptions: str | None = None,
        train_images: str | None = None,
        test_images: str | None = None,
        suffix: str = ".jpg",
        class_file: str | None = None,
    ) -> None:
        self._files = {
            "train": train, "test": test, "class_descriptions": class_descriptions, "train_images": train_images,
            "test_images": test_images, "class_file": class_file,
        }  # fmt: skip
        if train is None:
            raise ConfigError("OpenImages: train is None; give the path of a label file.")
        check_paths(**{f"OpenImages: {name}": value for name, value in (self._files | {"root": root}).items()})
        check_kind("OpenImages: suffix", suffix, str, "a string such as .jpg")
        self._root, self._suffix = root, suffix or ""

    def __repr__(self) -> str:
        return f"OpenImages(train={self._files['train']!r}, test={self._files['test']!r})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``class_descriptions``, or the label names in the training file."""
        return self._classes[0].class_names

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompt names of the class file, or the class names with "_" replaced by a space."""
        return self._classes[0].prompt_names

    def describe(self) -> list[str]:
        """Returns notes on content other than verified labels, with counts."""
        return [note for part in ("train", "test") for note in self._tables[part][1]]

    def prepare(self) -> None:
        """Checks that all files exist.

        Raises:
            DataError: If a file does not exist.
        """
        require_named(self._files.items())

    def train(self) -> AnnotationTable:
        """Returns images and labels of the training files."""
        table = self._tables["train"][0]
        assert table is not None  # noqa: S101 - there is always a training file
        return table

    def test(self) -> AnnotationTable | None:
        """Returns images and labels of the test files."""
        return self._tables["test"][0]

    @cached_property
    def _classes(self) -> tuple[ClassFile, dict[str, int]]:
        """Returns the classes, and a mapping from label name to position."""
        file = self._files["class_descriptions"]
        if file is None:
            file = str(self._files["train"])
            described = {name: name for name in sorted(pc.unique(_column(read_columns(file), "LabelName")).to_pylist())}
        else:
            described = _descriptions(Path(file))
        names = check_class_names(list(described.values()), file)
        class_file = self._files["class_file"]
        prompts = default_prompts(names) if class_file is None else read_class_file(class_file).prompts_for(names)
        classes = ClassFile(Path(file), names, check_prompt_names(names, prompts, file), {})
        return classes, {label: k for k, label in enumerate(described)}

    @cached_property
    def _tables(self) -> dict[str, tuple[AnnotationTable | None, list[str]]]:
        """Returns the table and the notes of each part."""
        return {part: self._read(part) for part in ("train", "test")}

    def _read(self, part: str) -> tuple[AnnotationTable | None, list[str]]:
        file, image_file = self._files[part], self._files[f"{part}_images"]
        if file is None:
            return None, []
        classes, position = self._classes
        columns = read_columns(file)
        rows = _column(columns, "ImageID").dictionary_encode()
        labels = _column(columns, "LabelName").dictionary_encode()
        image_of_row = rows.indices.to_numpy(zero_copy_only=False)
        codes = np.array([position.get(name, -1) for name in labels.dictionary.to_pylist()], dtype=np.int64)
        class_of_row = codes[labels.indices.to_numpy(zero_copy_only=False)]
        values = _values(columns)
        ids, listed_in = rows.dictionary, columns
        if image_file is not None:
            listed_in = read_columns(image_file)
            ids = _column(listed_in, "ImageID")
            place = pc.index_in(rows.dictionary, value_set=ids)
            if place.null_count:
                extra = rows.dictionary.filter(place.is_null()).to_pylist()
                raise DataError(
                    f"{file}: there are images that are not in {image_file}: {listed(map(brief, extra))}; add "
                    "them there"
                )
            image_of_row = place.to_numpy(zero_copy_only=False)[image_of_row]
        known = class_of_row >= 0
        if not known.any():
            raise DataError(
                f"{file}: no row contains a class of {classes.path}; use the descriptions of the same release"
            )
        matrix, differing = _matrix(
            (len(ids), len(classes.class_names)), image_of_row[known], class_of_row[known], values[known], file
        )
        root = Path(file).parent if self._root is None else Path(self._root)
        first = dict(zip(ids.to_pylist(), range(len(ids)), strict=True))
        if len(first) < len(ids):
            raise DataError(f"{listed_in.path}: an image is listed twice; keep one row per image")
        names = [f"{name}{self._suffix}" if name else "" for name in first]

        def where(i: int) -> str:
            return f"{listed_in.path}, image {brief(ids[i].as_py())}"

        paths = tidy_paths(root, root, names, where)
        refuse_repeated(paths, where)
        table = AnnotationTable(root, paths, matrix, classes.class_names, classes.prompt_names)
        said = [
            (int((~known).sum()), "row", f"of labels that are not in {classes.path}: omitted"),
            (int((known & (values < 0)).sum()), "row", "with the confidence of a model: unknown"),
            (differing, "label", "with contradictory rows: unknown"),
            (int((matrix < 0).all(axis=1).sum()), "image", "without a verified label: unlabeled"),
        ]
        return table, [f"{file}: {counted(count, noun)} {rest}" for count, noun, rest in said if count]


def _descriptions(file: Path) -> dict[str, str]:
    """Reads a mapping from label name to class name from a CSV file with or without a header.

    Raises:
        DataError: If the file is missing, a row does not have two cells, or a label occurs twice.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(file, "download the class descriptions of Open Images"), start=1):
        try:
            row = next(csv.reader([line], strict=True), [])  # read line by line, since names do not contain line breaks
        except csv.Error as error:
            raise DataError(f"{file}, row {number}: the row is not CSV ({error}); download the file again") from error
        if not row or (number == 1 and row == _HEADER):
            continue
        if len(row) != 2:
            raise DataError(f"{file}, row {number}: {brief(row)} is not a label name and a class name; correct it")
        if row[0].strip() in found:
            raise DataError(f"{file}, row {number}: label {brief(row[0])} occurs twice; keep one row")
        found[row[0].strip()] = row[1]
    return found


def _column(columns: Columns, name: str) -> Any:
    if name not in columns.names:
        found = listed(map(brief, columns.names))
        raise DataError(
            f"{columns.path}: there is no column named {name!r}, only {found}; use the image labels of Open Images"
        )
    return columns.text(name).fill_null("")


def _values(columns: Columns) -> NDArray[np.int8]:
    """Returns the label of each row, which is 1, 0, or -1 if a model predicted the confidence."""
    cells = _column(columns, "Confidence")
    different = cells.dictionary_encode()
    values = []
    for cell in different.dictionary.to_pylist():
        try:
            value = float(cell)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= 1:
            row = pc.index(cells, cell).as_py()
            raise DataError(
                f"{columns.where(row)}: Confidence must be a number from 0 to 1, found {brief(cell)}; correct it"
            )
        values.append(int(value) if value in (0, 1) else UNKNOWN)
    rows = different.indices.to_numpy(zero_copy_only=False)
    return np.asarray(np.array(values, dtype=np.int8)[rows], dtype=np.int8)


def _matrix(
    shape: tuple[int, int], images: NDArray[Any], classes: NDArray[Any], values: NDArray[np.int8], file: str
) -> tuple[NDArray[np.int8], int]:
    """Returns labels (n, C), and the number of labels that are unknown because rows contradict each other."""
    if 2 * shape[0] * shape[1] > memory_of_machine():
        raise DataError(
            f"{file}: {shape[0]:,} images and {shape[1]:,} classes do not fit into memory; use fewer classes"
        )
    labels = np.full(shape, UNKNOWN, dtype=np.int8)
    no, yes = values == 0, values == 1
    labels[images[no], classes[no]] = 0
    i, k = images[yes], classes[yes]
    both = labels[i, k] == 0
    labels[i, k] = 1
    labels[i[both], k[both]] = UNKNOWN
    return labels, len(set(zip(i[both].tolist(), k[both].tolist(), strict=True)))
