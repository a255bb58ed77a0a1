"""Tables of predictions, which contain the labels of each image and the score of every class."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.files import replacing

SEPARATOR = ";"
NOTHING = "none"  # entry of the column of labels if the image has no class
COLUMNS = ("image", "labels")

WRITERS: dict[str, Callable[[Any, str], None]] = {
    ".csv": pyarrow.csv.write_csv,
    ".parquet": pyarrow.parquet.write_table,
}


def check_output(path: str | os.PathLike[str], class_names: Sequence[str]) -> None:
    """Checks, before any work is done, that :func:`write_predictions` can write its output.

    Raises:
        ConfigError: If the suffix is not .csv or .parquet, the file cannot be written to this location, or a class name
            would make the table ambiguous.
    """
    if Path(path).suffix.lower() not in WRITERS:
        raise ConfigError(
            f"{path}: predictions can be written as {' or '.join(WRITERS)}; choose one of these suffixes."
        )
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder; use a file name.")
    folder = next(folder for folder in Path(os.path.abspath(path)).parents if os.path.lexists(folder))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: predictions cannot be written below {folder}, which is not a writable folder.")
    ambiguous = [repr(name) for name in class_names if name in (*COLUMNS, NOTHING) or SEPARATOR in name]
    if ambiguous:
        raise ConfigError(
            f"A table of predictions has the columns {' and '.join(COLUMNS)}, uses '{SEPARATOR}' to separate labels, "
            f"and uses '{NOTHING}' for an image without labels, so these class names are ambiguous: "
            f"{listed(ambiguous)}. Rename them in the annotations."
        )


def write_predictions(
    path: str | os.PathLike[str],
    table: AnnotationTable,
    class_names: Sequence[str],
    scores: NDArray[np.float32],
    labels: NDArray[np.bool_],
) -> None:
    """Writes predictions as CSV or Parquet, in the order of the table.

    The columns are ``image`` (the path as in the table), ``labels`` (names joined by ";", or "none"), and one column
    per class with its float32 scores. The file is written atomically and replaces an existing file.

    Args:
        path: Output file; the suffix, .csv or .parquet, determines the format. Missing folders are created.
        table: The n images.
        class_names: The C class names.
        scores: ``(n, C)`` in [0, 1], one row per image of ``table``.
        labels: ``(n, C)``, whether the image has the label.

    Raises:
        ConfigError: See :func:`check_output`.
        DataError: If images have no prediction, or arrays do not fit the table.
        OutputError: If the file cannot be written.
    """
    path = Path(path)
    check_output(path, class_names)
    expected = (len(table), len(class_names))
    if scores.shape != expected or labels.shape != expected:
        raise DataError(
            f"{path}: {len(table)} images and {len(class_names)} classes need scores and labels of shape {expected}; "
            f"got {scores.shape} and {labels.shape}"
        )
    missing = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(missing):
        found = listed(f"{table.paths[i]} (row {i})" for i in missing)
        raise DataError(f"{path}: {len(missing)} of {len(table)} images have no finite score: {found}")
    names = np.array(class_names, dtype=object)
    columns: dict[str, Any] = {
        "image": pa.array(table.paths.tolist(), pa.string()),
        "labels": pa.array([SEPARATOR.join(names[row]) or NOTHING for row in labels], pa.string()),
    }
    for k, name in enumerate(class_names):
        columns[name] = pa.array(np.ascontiguousarray(scores[:, k], dtype=np.float32))
    with replacing(path) as draft:
        WRITERS[path.suffix.lower()](pa.table(columns), str(draft))


def write_thresholds(
    path: Path,
    class_names: Sequence[str],
    prompt_names: Sequence[str],
    thresholds: NDArray[np.floating],
    positives: NDArray[np.integer],
    expected: NDArray[np.floating] | None,
    measured: Mapping[str, NDArray[np.floating]],
) -> None:
    """Writes a CSV with one row per class, which contains its threshold and the precision and recall of its labels.

    Args:
        path: Output file.
        class_names: The C class names.
        prompt_names: Class names in prompts.
        thresholds: ``(C,)``, decision threshold of each class; inf if no threshold meets the objective.
        positives: ``(C,)``, number of labeled images with the class.
        expected: ``(C, 6)``, see :class:`~cbsa_lightning.method.decisions.Decisions`; None without probabilities. The
            columns are then empty.
        measured: ``precision``, ``recall`` and ``positives`` on the validation images, each ``(C,)``; empty without
            validation images.

    Raises:
        OutputError: If the file cannot be written.
    """
    columns: dict[str, Any] = {"class": class_names, "prompt": prompt_names, "threshold": thresholds}
    columns["labeled_positives"] = positives
    bounds = [f"expected_{name}{end}" for name in ("precision", "recall") for end in ("", "_low", "_high")]
    values = np.full((len(class_names), len(bounds)), np.nan) if expected is None else expected
    columns.update(zip(bounds, values.T, strict=True))
    columns.update({f"validation_{name}": values for name, values in measured.items()})
    table = {
        name: pa.array(list(values), from_pandas=True) for name, values in columns.items()
    }  # NaN becomes an empty cell
    with replacing(path) as draft:
        pyarrow.csv.write_csv(pa.table(table), str(draft))


def write_left_out(path: Path, files: Sequence[tuple[str, str]]) -> None:
    """Writes a CSV with the columns ``image`` and ``reason`` for files without predictions.

    Raises:
        OutputError: If the file cannot be written.
    """
    names, reasons = zip(*files, strict=True)
    texts = [name.encode("utf-8", "replace").decode() for name in names]  # file names may not be valid UTF-8
    with replacing(path) as draft:
        pyarrow.csv.write_csv(pa.table({"image": pa.array(texts), "reason": pa.array(list(reasons))}), str(draft))


def in_table_order(
    num_rows: int,
    num_classes: int,
    parts: Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]],
    missing: Collection[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Sorts the predictions of all processes into the order of their table.

    Args:
        num_rows: n, number of rows of the table.
        num_classes: C.
        parts: ``(index (B,), scores (B, C), labels (B, C))``; the index is the row in the table. If an image occurs
            twice, the last prediction is used.
        missing: Rows without a prediction. Their scores are 0 and their labels are False.

    Returns:
        Scores ``(n, C)`` and labels ``(n, C)``.

    Raises:
        DataError: If other rows have no prediction.
    """
    scores = np.zeros((num_rows, num_classes), dtype=np.float32)
    labels = np.zeros((num_rows, num_classes), dtype=np.bool_)
    seen = np.zeros(num_rows, dtype=np.bool_)
    for index, some_scores, some_labels in parts:
        scores[index], labels[index], seen[index] = some_scores, some_labels, True
    seen[list(missing)] = True
    if not seen.all():
        rows = np.flatnonzero(~seen)
        raise DataError(
            f"{len(rows)} of {num_rows} images have no prediction: rows {listed(rows.tolist())}. A table of "
            "predictions must be complete. Run over all batches, without limits on their number."
        )
    return scores, labels
