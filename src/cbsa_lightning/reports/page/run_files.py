"""Reads what a finished run has written, no more of it than the page shows."""

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
    """The images that a run was measured on.

    Attributes:
        table: The n images with their labels.
        scores: ``(n, C)`` float32 in [0, 1].
        given: ``(n, C)`` bool, whether the model gives the class.
    """

    table: AnnotationTable
    scores: NDArray[np.float32]
    given: NDArray[np.bool_]


@dataclass(frozen=True)
class Unlabeled:
    """The labels that the model gives to the m unlabeled images.

    Attributes:
        images: ``(m,)`` paths.
        labels: ``(m,)`` given classes of each image, joined with ";".
        counts: ``(C,)``, how many images are given the class.
        scores: ``(m,)`` scores in [0, 1] by class, of some classes.
    """

    images: pa.ChunkedArray
    labels: pa.ChunkedArray
    counts: NDArray[np.int64]
    scores: dict[int, NDArray[np.float32]]


class Listing(NamedTuple):
    """The first rows of a list, and the number of all rows."""

    rows: list[dict[str, str]]
    total: int


def read_thresholds(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Threshold and number of labeled positives of each class, both ``(C,)``."""
    types = {"threshold": pa.float32(), "labeled_positives": pa.int64()}
    table = _read(folder / THRESHOLDS, types)
    return table["threshold"].to_numpy(), table["labeled_positives"].to_numpy()


def read_validation(folder: Path, table: AnnotationTable, thresholds: NDArray[np.float32]) -> Validation:
    """Scores of the validation images.

    Raises:
        DataError: The file is of other images than ``table``.
    """
    path = folder / PREDICTIONS
    found = _read(path, {"image": pa.string(), **dict.fromkeys(table.class_names, pa.float32())})
    if found["image"].to_pylist() != table.paths.tolist():
        raise DataError(f"{path}: does not hold the validation images of this run; delete the file and fit again.")
    scores = np.stack([found[name].to_numpy() for name in table.class_names], axis=1)
    return Validation(table, scores, scores >= thresholds)


def read_unlabeled(folder: Path, class_names: Sequence[str], shown: Sequence[int]) -> Unlabeled:
    """Labels of the unlabeled images, with the scores of the classes ``shown``; others are not kept in memory.

    Raises:
        DataError: The file names a class that the run does not have.
    """
    names = [class_names[k] for k in shown]
    table = _read(folder / LABELS, {"image": pa.string(), "labels": pa.string(), **dict.fromkeys(names, pa.float32())})
    counts = np.zeros(len(class_names), np.int64)
    position = {name: k for k, name in enumerate(class_names)}
    for entry in pc.value_counts(pc.list_flatten(pc.split_pattern(table["labels"], SEPARATOR))).to_pylist():
        name = entry["values"]
        if name != NOTHING and name not in position:
            raise DataError(f"{folder / LABELS}: names {name!r}, which is no class of this run; correct the file.")
        if name != NOTHING:
            counts[position[name]] = entry["counts"]
    scores = {k: table[class_names[k]].to_numpy() for k in shown}
    return Unlabeled(table["image"], table["labels"], counts, scores)


def read_listing(path: Path, first: int) -> Listing | None:
    """The first rows of a list for review; None if the run has none."""
    if not path.is_file():
        return None
    table = _read(path, None)
    return Listing(table.slice(0, first).to_pylist(), table.num_rows)


def _read(path: Path, types: dict[str, Any] | None) -> pa.Table:
    """Some columns of a CSV file; None: all columns, as text."""
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    try:
        if types is None:
            with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
                types = dict.fromkeys(reader.schema.names, pa.string())
        convert = pyarrow.csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=False)
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: is not as this run writes it ({error}); delete it and fit again.") from error
