"""The images whose labels a run has used. They are saved in its folder, for comparison with later runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.splits import Split
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.files import replacing

_CLASSES = b"class_names"


@dataclass(frozen=True)
class LabeledImages:
    """Labeled images of a run.

    Attributes:
        class_names: The C class names.
        images: Paths of the n images in the run's table.
        files: Full paths of the n images.
        held_out: ``(n,)`` bool, whether an image was used only for validation.
        labels: ``(n, C)`` int8 in {1, 0, -1 unknown}.
    """

    class_names: list[str]
    images: list[str]
    files: list[str]
    held_out: NDArray[np.bool_]
    labels: NDArray[np.int8]

    @classmethod
    def of(cls, table: AnnotationTable, split: Split) -> LabeledImages:
        """Returns the labeled images of a run with the given training table and split."""
        rows = np.concatenate([split.labeled, split.held_out])
        held_out = np.arange(len(rows)) >= len(split.labeled)
        files = [str(table.file(row).absolute()) for row in rows.tolist()]
        return cls(list(table.class_names), table.paths[rows].tolist(), files, held_out, table.labels[rows])

    def write(self, path: Path) -> None:
        """Writes the images to a Parquet file.

        Raises:
            OutputError: If the file cannot be written.
        """
        flat = pa.array(self.labels.reshape(-1), pa.int8())
        columns = {
            "image": pa.array(self.images, pa.string()),
            "file": pa.array(self.files, pa.string()),
            "held_out": pa.array(self.held_out),
            "labels": pa.FixedSizeListArray.from_arrays(flat, len(self.class_names)),
        }
        table = pa.table(columns).replace_schema_metadata({_CLASSES: json.dumps(self.class_names)})
        with replacing(path) as draft:
            pq.write_table(table, draft)

    @classmethod
    def read(cls, path: Path) -> LabeledImages:
        """Reads a file that was written by :meth:`write`.

        Raises:
            DataError: If the file is missing or damaged.
        """
        try:
            table = pq.read_table(path)
            names = json.loads(table.schema.metadata[_CLASSES])
            flat = [chunk.flatten().to_numpy() for chunk in table["labels"].chunks]
            labels = np.concatenate([np.empty(0, np.int8), *flat]).reshape(table.num_rows, len(names))
            if labels.dtype != np.int8:
                raise ValueError("labels are not small integers")
            held_out = table["held_out"].to_numpy().astype(bool)
            return cls(names, table["image"].to_pylist(), table["file"].to_pylist(), held_out, labels)
        except (OSError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: the file was not written by a run ({error}). Restore it from the run.") from error

    def trained(self) -> frozenset[str]:
        """Returns the paths of the images whose labels were used for training, both as in the table and in full."""
        kept = np.flatnonzero(~self.held_out).tolist()
        return frozenset([self.images[i] for i in kept] + [self.files[i] for i in kept])


def rows_among(table: AnnotationTable, paths: frozenset[str]) -> NDArray[np.bool_]:
    """Returns a mask ``(n,)`` of the images whose path, as in the table or in full, is one of ``paths``."""
    if not paths:
        return np.zeros(len(table), dtype=bool)
    found = (str(p) in paths or str(table.file(i).absolute()) in paths for i, p in enumerate(table.paths.tolist()))
    return np.fromiter(found, np.bool_, len(table))
