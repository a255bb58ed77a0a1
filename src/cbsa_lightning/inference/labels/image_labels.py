"""Predicted labels of images as a table, which users can correct and then read as annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.inference.predictions import NOTHING, SEPARATOR, WRITERS
from cbsa_lightning.io.files import replacing

COLUMNS = ("image", "labels", "review", "place")
SURE = 0.8


def _write_json_lines(table: pa.Table, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in table.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


_WRITERS: dict[str, Callable[[Any, str], None]] = {**WRITERS, ".jsonl": _write_json_lines}


@dataclass(frozen=True)
class ImageLabels:
    """Probabilities of n images, with decisions and review marks.

    Attributes:
        images: ``(n,)``, paths of the images as in their table.
        class_names: The C class names.
        probabilities: ``(n, C)`` float32 in [0, 1].
        given: ``(n, C)`` bool, whether the image gets the class.
        review: ``(n, C)`` bool, whether a person should review the decision.
    """

    images: NDArray[Any]
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float32]
    given: NDArray[np.bool_]
    review: NDArray[np.bool_]

    @classmethod
    def decided(
        cls,
        images: NDArray[Any],
        class_names: Sequence[str],
        probabilities: NDArray[np.float32],
        thresholds: NDArray[np.floating],
        sure: float | None = SURE,
    ) -> Self:
        """Applies decision thresholds, and marks uncertain decisions for review.

        Args:
            images: ``(n,)``, paths of the images.
            class_names: The C class names.
            probabilities: ``(n, C)``, in [0, 1].
            thresholds: ``(C,)``, decision threshold of each class.
            sure: Minimum probability of being correct; decisions with a lower probability are marked for review. With
                None, no decision is marked. Use None for scores that are not probabilities.
        """
        given = probabilities >= thresholds
        right = np.where(given, probabilities, 1 - probabilities)
        review = np.zeros_like(given) if sure is None else right < sure
        return cls(images, tuple(class_names), probabilities, given, review)

    def with_known(self, first: int, known: NDArray[np.int8]) -> Self:
        """Returns a copy in which known labels replace decisions, with probability 1 or 0 and without review marks.

        Args:
            first: Index of the first image with known labels; all later images also have known labels.
            known: ``(n - first, C)`` in {1, 0, -1 unknown}.
        """
        there = np.concatenate([np.full((first, len(self.class_names)), -1, np.int8), known])
        return replace(
            self,
            probabilities=np.where(there < 0, self.probabilities, there).astype(np.float32),
            given=np.where(there < 0, self.given, there == 1),
            review=self.review & (there < 0),
        )

    @cached_property
    def doubt(self) -> NDArray[np.float64]:
        """Returns the entropy ``(n,)`` of all decisions about an image, in bits."""
        return doubt_of(self.probabilities)

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Returns the position ``(n,)`` of each image in the review order, from 1 for the most uncertain image."""
        places = np.empty(len(self.images), np.int64)
        places[np.argsort(-self.doubt, kind="stable")] = np.arange(1, len(self.images) + 1)
        return places

    def names(self, chosen: NDArray[np.bool_]) -> list[list[str]]:
        """Returns the class names in each row of ``chosen (n, C)``."""
        names = np.array(self.class_names, dtype=object)
        return [names[row].tolist() for row in chosen]


def doubt_of(probabilities: NDArray[np.floating], weights: NDArray[np.floating] | None = None) -> NDArray[np.float64]:
    """Returns the sum ``(n,)`` of the binary entropies of all classes, in bits.

    Args:
        probabilities: ``(n, C)`` in [0, 1].
        weights: ``(C,)``, weights of the classes.
    """
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    entropies = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    found: NDArray[np.float64] = entropies.sum(1) if weights is None else entropies @ weights
    return found


def check_class_columns(class_names: Sequence[str]) -> None:
    """Rejects class names that a table of labels cannot contain.

    Raises:
        ConfigError: If a class name is also the name of a column, or contains the separator.
    """
    ambiguous = [repr(n) for n in class_names if n in (*COLUMNS, NOTHING) or SEPARATOR in n]
    if ambiguous:
        raise ConfigError(
            f"A table of labels has the columns {', '.join(COLUMNS)}, uses '{SEPARATOR}' to separate names, and uses "
            f"'{NOTHING}' for an image that shows no class, so it cannot contain these classes: {listed(ambiguous)}. "
            "Rename them in the annotations, or disable the table (--labels.enabled false)."
        )


def write_labels(path: Path, labels: ImageLabels) -> None:
    """Writes one row per image with path, labels, labels to review, position in the review order and probabilities.

    The table reader can read this file. Classes in the column ``review`` are then unknown, and all others are known.

    Args:
        path: Output file, which is written atomically; the suffix, .csv, .parquet or .jsonl, determines the format.
        labels: The labels.

    Raises:
        ConfigError: If the suffix is not supported, or :func:`check_class_columns` rejects a class name.
        OutputError: If the file cannot be written.
    """
    check_class_columns(labels.class_names)
    if path.suffix.lower() not in _WRITERS:
        raise ConfigError(f"{path}: labels can be written as {', '.join(_WRITERS)}; choose one of these suffixes.")
    columns: dict[str, Any] = {
        "image": pa.array(labels.images.tolist(), pa.string()),
        "labels": pa.array([SEPARATOR.join(names) or NOTHING for names in labels.names(labels.given)], pa.string()),
        "review": pa.array([SEPARATOR.join(names) for names in labels.names(labels.review)], pa.string()),
        "place": pa.array(labels.places),
    }
    for k, name in enumerate(labels.class_names):
        columns[name] = pa.array(np.ascontiguousarray(labels.probabilities[:, k], dtype=np.float32))
    with replacing(path) as draft:
        _WRITERS[path.suffix.lower()](pa.table(columns), str(draft))


def read_labels(path: str | os.PathLike[str]) -> ImageLabels:
    """Reads a CSV or Parquet file of :func:`write_labels`, which a user may have changed.

    Raises:
        DataError: If the format is wrong or a name is not a class; the message names the row.
    """
    try:
        table = _table(Path(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a table of labels ({error}).") from error
    if tuple(table.column_names[: len(COLUMNS)]) != COLUMNS:
        raise DataError(
            f"{path} is not a table of labels, whose first columns are {', '.join(COLUMNS)}; found "
            f"{listed(table.column_names, 4)}. Use the labels.csv of a run."
        )
    class_names = tuple(table.column_names[len(COLUMNS) :])
    try:
        parts = [pc.cast(table.column(name), pa.float32()).to_numpy() for name in class_names]
    except pa.ArrowException as error:
        raise DataError(f"{path}: a probability is not a number ({error}).") from error
    probabilities = np.stack(parts, 1) if parts else np.zeros((table.num_rows, 0), np.float32)
    if wrong := np.flatnonzero(~((probabilities >= 0) & (probabilities <= 1)).all(1)).tolist():
        raise DataError(f"{path}: probabilities are not in [0, 1] in rows {listed([row + 2 for row in wrong])}.")
    given, review = (_members(table.column(name).to_pylist(), class_names, path) for name in ("labels", "review"))
    images = np.array(table.column("image").to_pylist(), dtype=np.dtypes.StringDType())
    return ImageLabels(images, class_names, probabilities, given, review)


def _table(path: Path) -> pa.Table:
    if path.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_table(path)
    text = {name: pa.string() for name in COLUMNS[:3]}
    options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
    return pyarrow.csv.read_csv(path, convert_options=options)


def _members(cells: list[str | None], class_names: tuple[str, ...], path: Any) -> NDArray[np.bool_]:
    """Returns a mask ``(n, C)`` of the classes that each cell names."""
    position = {name: k for k, name in enumerate(class_names)}
    found = np.zeros((len(cells), len(class_names)), dtype=np.bool_)
    for row, cell in enumerate(cells):
        names = [name.strip() for name in (cell or "").split(SEPARATOR) if name.strip() not in ("", NOTHING)]
        if unknown := [name for name in names if name not in position]:
            raise DataError(
                f"{path}: row {row + 2} names {listed(map(repr, unknown))}, which is not a class of the table."
            )
        found[row, [position[name] for name in names]] = True
    return found
