"""Splits into labeled and unlabeled images, which depend on (fraction, seed) and are saved for one table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbsa_lightning.data.annotations import UNKNOWN, AnnotationTable, json_pieces
from cbsa_lightning.data.drawn_files import check_table, check_unchanged, read_draw
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.reading import brief

Rows = NDArray[np.int64]
PARTS = ("labeled", "unlabeled", "held_out")
# Names of the parts in files and digests of format 1.
_STORED = {"labeled": "labelled", "unlabeled": "unlabelled", "held_out": "held_out"}


@dataclass(frozen=True, eq=False)
class Split:
    """Three disjoint parts of the rows of an annotation table.

    Attributes:
        labeled: (m,) int64 rows whose labels are used for training.
        unlabeled: (u,) int64 rows that are used for training without labels.
        held_out: (v,) int64 labeled rows that are used only for validation.
        fraction: Requested labeled fraction, or None if the table determines which rows are labeled.
        seed: Seed of the permutation, or None if nothing was drawn.
        table_digest: ``AnnotationTable.digest()`` of the table, or "" if unknown.

    Raises:
        DataError: If a row occurs more than once or is negative.
    """

    labeled: Rows
    unlabeled: Rows
    held_out: Rows = dataclasses.field(default_factory=lambda: np.empty(0, dtype=np.int64))
    fraction: float | None = None
    seed: int | None = None
    table_digest: str = ""

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, _as_rows(getattr(self, part), part))
        rows = np.concatenate([self.labeled, self.unlabeled, self.held_out])
        rows.sort()
        if len(rows) and rows[0] < 0:
            raise DataError(f"split: row {rows[0]} is negative; rows are counted from 0")
        if (again := rows[1:] == rows[:-1]).any():
            raise DataError(
                f"split: rows that occur more than once: {listed(np.unique(rows[1:][again]))}; "
                "each row must be labeled, unlabeled or held out only once"
            )

    def without(self, rows: ArrayLike) -> Split:
        """Returns a split without the given rows."""
        parts = {part: getattr(self, part) for part in PARTS}
        return dataclasses.replace(self, **{part: kept[~np.isin(kept, rows)] for part, kept in parts.items()})

    @property
    def labeled_share(self) -> float:
        """p, the labeled fraction of the training images. It is the requested fraction or that of the table."""
        # The requested fraction is preferred: int(p n) / n may be less than p, which can affect rounding.
        if self.fraction is not None:
            return self.fraction
        return len(self.labeled) / max(len(self.labeled) + len(self.unlabeled), 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the three parts in order. Runs with equal digests train on the same rows."""
        sha = hashlib.sha256()
        for part in PARTS:
            rows = getattr(self, part)
            sha.update(f"{_STORED[part]} {len(rows)}\n".encode())
            sha.update(rows.astype("<i8").tobytes())
        return sha.hexdigest()

    def save(self, path: str | Path, table: AnnotationTable | None = None) -> None:
        """Writes the split as JSON.

        Args:
            path: File to write. Its folder is created if it does not exist.
            table: The table that the rows belong to. Required unless ``table_digest`` is set.

        Raises:
            ConfigError: If neither ``table_digest`` nor ``table`` is set.
            OutputError: If the file cannot be written. An existing file is left unchanged.
        """
        table_digest = table.digest() if table is not None else self.table_digest
        if not table_digest:
            raise ConfigError(
                "split: the table of its rows is unknown; call save(path, table), "
                "so that the file cannot be used with another table"
            )
        record = {
            "format": "cbsa_lightning split 1",
            "table_digest": table_digest,
            "digest": self.digest,
            "fraction": self.fraction,
            "seed": self.seed,
        }
        head = json.dumps(record).removesuffix("}")
        path = Path(path)
        # The file is written in pieces, because one string of ten million rows would need half a gigabyte.
        with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
            file.write(head)
            for part in PARTS:
                file.write(f', "{_STORED[part]}": ')
                file.writelines(json_pieces(getattr(self, part)))
            file.write("}\n")

    @classmethod
    def load(cls, path: str | Path, table: AnnotationTable) -> Split:
        """Reads a split that was written by :meth:`save`.

        Raises:
            DataError: If the file is missing, is not a split, was modified, belongs to another table, or contains rows
                that the table does not have.
        """
        record = _read_record(Path(path))
        digest = check_table(path, "split", record["table_digest"], table)
        try:
            split = cls(
                record["labelled"],
                record["unlabelled"],
                record["held_out"],
                fraction=record["fraction"],
                seed=record["seed"],
                table_digest=digest,
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        check_unchanged(path, "split", "rows", split.digest, record["digest"])
        if beyond := [
            row for part in PARTS for row in getattr(split, part)[getattr(split, part) >= len(table)].tolist()
        ]:
            raise DataError(
                f"{path}: the split contains rows {listed(beyond)}, but the table has {len(table)} rows; draw it again"
            )
        return split


def make_split(
    table: AnnotationTable,
    *,
    file: str | None = None,
    labeled_fraction: float | None = None,
    held_out_fraction: float | None = None,
    has_test: bool = False,
    seed: int = 1,
    keep: ArrayLike = (),
) -> Split:
    """Creates the split of a run according to its settings.

    Args:
        table: The training images.
        file: File of a saved split. If it is given, no split is drawn.
        labeled_fraction: Fraction of the images that keep their labels. None uses all known labels of the table.
        held_out_fraction: Fraction of the labeled images to hold out. None uses 0 with a test table, else 0.2.
        has_test: Whether there is a test table.
        seed: Seed of the random draws.
        keep: Rows that must not be held out.

    Raises:
        DataError: If the file belongs to another table, a labeled fraction is given for a table with unlabeled images,
            or there are no labeled images.
        ConfigError: If a fraction leaves no labeled, unlabeled or held-out images.
    """
    if file is not None:
        return Split.load(Path(file), table)
    if labeled_fraction is None:
        split = split_known(table)
    else:
        if unknown := int((table.labels < 0).all(1).sum()):
            raise DataError(
                f"labeled_fraction {labeled_fraction} requires a table whose images all have labels, "
                f"but {unknown} of {len(table)} training images have none. Omit it to use all images with labels as "
                "labeled images."
            )
        split = split_labeled(len(table), labeled_fraction, seed, table.digest())
    share = held_out_fraction
    if share is None:
        share = 0.0 if has_test else 0.2
    return hold_out(split, share, seed, keep) if share else split


def split_labeled(num_images: int, fraction: float, seed: int, table_digest: str = "") -> Split:
    """Draws the labeled rows, which are the first ``int(fraction * num_images)`` rows of a seeded permutation.

    This is CAP's rule, which the paper's tables use, so the same image order and seed result in the same rows. Splits
    with the same seed are nested: those of a smaller fraction are subsets of those of a larger fraction.

    Args:
        num_images: Number of rows of the table.
        fraction: Labeled fraction, greater than 0 and at most 1.
        seed: Seed of ``np.random.RandomState``, whose random stream is guaranteed not to change.
        table_digest: Digest of the table, if known.

    Raises:
        ConfigError: If the fraction is out of range or leaves no labeled images.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"the labeled fraction is {fraction}, but must be greater than 0 and at most 1; 0.05 means 5 %"
        )
    count = int(fraction * num_images)
    if count == 0:
        raise ConfigError(
            f"labeled fraction {fraction} of {num_images} images leaves no labeled images; "
            + (f"use at least {1 / num_images:.3g}" if num_images else "the table has no rows")
        )
    order = np.random.RandomState(seed).permutation(num_images)
    return Split(order[:count], order[count:], fraction=fraction, seed=seed, table_digest=table_digest)


def split_known(table: AnnotationTable) -> Split:
    """Splits a table by known labels. Rows with any known label are labeled, and the others are unlabeled.

    Raises:
        DataError: If no row has a known label.
    """
    known = table.labels.max(axis=1) > UNKNOWN  # UNKNOWN is the lowest value; this avoids another matrix
    if not known.any():
        raise DataError(
            f"all {len(table)} rows of the table under {table.root} are unlabeled; label some of them first"
        )
    return Split(np.flatnonzero(known), np.flatnonzero(~known), table_digest=table.digest())


def hold_out(split: Split, fraction: float, seed: int, keep: ArrayLike = ()) -> Split:
    """Moves ``int(fraction * m)`` of the m labeled rows to ``held_out``. The others keep their order.

    Args:
        split: A split without held-out rows.
        fraction: Fraction of the labeled rows.
        seed: Seed of ``np.random.RandomState``.
        keep: Rows that must not be held out. If fewer other rows exist than requested, all of them are held out.

    Raises:
        ConfigError: If rows are already held out, or no rows would be held out or remain for training.
    """
    if len(split.held_out):
        raise ConfigError(f"{len(split.held_out)} rows are already held out; use a split without held-out rows")
    m = len(split.labeled)
    count = int(fraction * m) if 0 < fraction < 1 else 0  # int() fails for NaN and infinity
    if not 0 < count < m:
        raise ConfigError(
            f"a fraction of {fraction} of {m} labeled images cannot be held out for validation, because at least one "
            "image must be held out and one must remain; label more images, use another fraction, or give a test table"
        )
    order = np.random.RandomState(seed).permutation(m)
    order = order[~np.isin(split.labeled[order], np.asarray(keep, dtype=np.int64))]
    if not len(order):
        raise ConfigError(
            f"None of the {m} labeled images can be held out, because the run of --init_from was trained on all of "
            "them and their validation score would be too high. Label more images, add a test table, or omit "
            "--init_from."
        )
    chosen = np.zeros(m, dtype=bool)
    chosen[order[:count]] = True
    return dataclasses.replace(split, labeled=split.labeled[~chosen], held_out=split.labeled[chosen])


def partly_labeled(table: AnnotationTable, split: Split) -> Rows:
    """Returns the rows in ``split.labeled`` that have unknown labels."""
    rows: Rows = split.labeled[(table.labels[split.labeled] == UNKNOWN).any(axis=1)]
    return rows


def _as_rows(rows: ArrayLike, part: str) -> Rows:
    array = np.asarray(rows)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or array.max() > np.iinfo(np.int64).max:
        raise DataError(
            f"split: the part {part} has shape {array.shape} and type {array.dtype}; expected (n,) integers"
        )
    return array.astype(np.int64)


def _read_record(path: Path) -> dict[str, Any]:
    record = read_draw(path, "split", "the split file does not exist; correct the path or draw a split")
    needed = ("table_digest", "digest", "fraction", "seed", *_STORED.values())
    absent = [key for key in needed if not isinstance(record, dict) or key not in record]
    if absent:
        raise DataError(f"{path}: the file is not a split, since it lacks {listed(absent)}; draw the split again")
    for part in _STORED.values():
        if type(record[part]) is not list or not all(type(row) is int and row < 1 << 63 for row in record[part]):
            raise DataError(f"{path}: {part} must be a list of row numbers; draw the split again")
    fraction, seed = record["fraction"], record["seed"]
    if fraction is not None and not (type(fraction) in (int, float) and 0 < fraction <= 1):
        raise DataError(
            f"{path}: fraction must be greater than 0 and at most 1, or null; found {brief(fraction)}; draw it again"
        )
    if seed is not None and type(seed) is not int:
        raise DataError(f"{path}: seed must be an integer or null; found {brief(seed)}; draw the split again")
    return dict(record)
