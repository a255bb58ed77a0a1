"""Reads the content of the page from the files of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.predictions import NOTHING, SEPARATOR
from cbsa_lightning.io.runs import LABELS, PREDICTIONS, THRESHOLDS


@dataclass(frozen=True)
class Validation:
    """Validation images with their scores.

    Attributes:
        table: The n images with their labels.
        scores: ``(n, C)`` float32 in [0, 1].
        given: ``(n, C)`` bool, whether the model predicts the class.
    """

    table: AnnotationTable
    scores: NDArray[np.float32]
    given: NDArray[np.bool_]


@dataclass(frozen=True)
class Unlabeled:
    """Predicted labels of the m unlabeled images.

    Attributes:
        images: ``(m,)``, paths of the images.
        labels: ``(m,)``, predicted classes of each image, joined by ";".
        counts: ``(C,)``, number of images for which each class is predicted.
        scores: Scores ``(m,)`` in [0, 1] of some classes, by class.
    """

    images: pa.ChunkedArray
    labels: pa.ChunkedArray
    counts: NDArray[np.int64]
    scores: dict[int, NDArray[np.float32]]


class Listing(NamedTuple):
    """The first rows of a list and the total number of rows."""

    rows: list[dict[str, str]]
    total: int


def read_thresholds(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Reads the threshold and the number of labeled positives of each class, both ``(C,)``."""
    types = {"threshold": pa.float32(), "labeled_positives": pa.int64()}
    table = _read(folder / THRESHOLDS, types)
    return table["threshold"].to_numpy(), table["labeled_positives"].to_numpy()


def read_validation(folder: Path, table: AnnotationTable, thresholds: NDArray[np.float32]) -> Validation:
    """Reads the scores of the validation images.

    Raises:
        DataError: If the images in the file differ from those in ``table``.
    """
    path = folder / PREDICTIONS
    found = _read(path, {"image": pa.string(), **dict.fromkeys(table.class_names, pa.float32())})
    if found["image"].to_pylist() != table.paths.tolist():
        raise DataError(f"{path} does not contain the validation images of this run; delete the file and train again.")
    scores = np.stack([found[name].to_numpy() for name in table.class_names], axis=1)
    return Validation(table, scores, scores >= thresholds)


def read_unlabeled(folder: Path, class_names: Sequence[str], shown: Sequence[int]) -> Unlabeled:
    """Reads the labels of the unlabeled images, and the scores of the classes ``shown``.

    Other scores are not kept in memory.

    Raises:
        DataError: If the file contains a class that the run does not have.
    """
    names = [class_names[k] for k in shown]
    table = _read(folder / LABELS, {"image": pa.string(), "labels": pa.string(), **dict.fromkeys(names, pa.float32())})
    counts = np.zeros(len(class_names), np.int64)
    position = {name: k for k, name in enumerate(class_names)}
    for entry in pc.value_counts(pc.list_flatten(pc.split_pattern(table["labels"], SEPARATOR))).to_pylist():
        name = entry["values"]
        if name != NOTHING and name not in position:
            raise DataError(f"{folder / LABELS} contains {name!r}, which is not a class of this run; correct the file.")
        if name != NOTHING:
            counts[position[name]] = entry["counts"]
    scores = {k: table[class_names[k]].to_numpy() for k in shown}
    return Unlabeled(table["image"], table["labels"], counts, scores)


def read_listing(path: Path, first: int) -> Listing | None:
    """Reads the first rows of a list for review; returns None if the run has none."""
    if not path.is_file():
        return None
    table = _read(path, None)
    return Listing(table.slice(0, first).to_pylist(), table.num_rows)


def _read(path: Path, types: dict[str, Any] | None) -> pa.Table:
    """Reads columns of a CSV file with the given types; if ``types`` is None, reads all columns as text."""
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    try:
        if types is None:
            with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
                types = dict.fromkeys(reader.schema.names, pa.string())
        convert = pyarrow.csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=False)
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} does not have the expected format ({error}); delete it and train again.") from error
