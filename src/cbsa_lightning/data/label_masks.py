"""Masks of known labels for the partial-label setting. They are drawn at random and stored in a file."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import NEGATIVE, POSITIVE, UNKNOWN, AnnotationTable
from cbsa_lightning.data.drawn_files import check_table, check_unchanged, read_draw
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.files import replacing

_FORMAT = "cbsa_lightning label mask 1"
_ROWS = 1 << 14  # number of rows that are drawn at a time


def known_mask(num_images: int, num_classes: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Draws the labels that remain known in the partial-label setting.

    A label is known if a uniform random number for its image and class is below ``share``. Positives and negatives are
    therefore hidden with equal probability, and the mask of a smaller share is a subset of that of a larger one. The
    random numbers are those of ``np.random.random((n, C))`` after ``np.random.seed(seed)``. With seed 0 and the same
    order of images and classes, the masks are those of SST, SARB, HST and DSRB. DualCoOp draws masks from the same
    distribution without a seed.

    Args:
        num_images: n, the number of images.
        num_classes: C, the number of classes.
        share: Expected fraction of known labels, from 0 to 1.
        seed: Seed of ``np.random.RandomState``.

    Returns:
        (n, C) bool, True if the label is known.

    Raises:
        ConfigError: If ``share`` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the fraction of known labels is {share}, but must be between 0 and 1; 0.1 means 10 %")
    random, known = np.random.RandomState(seed), np.empty((num_images, num_classes), dtype=bool)
    for start in range(0, num_images, _ROWS):
        block = known[start : start + _ROWS]
        block[...] = random.random_sample(block.shape) < share
    return known


@dataclass(frozen=True, eq=False)
class LabelMask:
    """Mask of the known labels of an annotation table.

    Attributes:
        known: (n, C) bool, False for labels that are hidden from training.
        table_digest: ``AnnotationTable.digest()`` of the table before the mask is applied.
        fraction: Requested fraction of known labels, or None if the mask was not drawn at random.
        seed: Random seed, or None.
    """

    known: NDArray[np.bool_]
    table_digest: str
    fraction: float | None = None
    seed: int | None = None

    @classmethod
    def draw(cls, table: AnnotationTable, fraction: float, seed: int) -> LabelMask:
        """Draws a mask; see :func:`known_mask`."""
        return cls(known_mask(len(table), table.num_classes, fraction, seed), table.digest(), fraction, seed)

    @classmethod
    def of(cls, table: AnnotationTable, known: NDArray[np.bool_]) -> LabelMask:
        """Creates a mask from a boolean array of shape (n, C).

        Raises:
            DataError: If its shape or type is not compatible with the table.
        """
        if known.shape != table.labels.shape or known.dtype != np.bool_:
            raise DataError(
                f"label mask: shape {known.shape} and type {known.dtype} are wrong; expected {table.labels.shape} bool"
            )
        return cls(known, table.digest())

    def __call__(self, table: AnnotationTable) -> AnnotationTable:
        """Returns the table with all other labels set to unknown."""
        return dataclasses.replace(table, labels=np.where(self.known, table.labels, np.int8(UNKNOWN)))

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the entries. Masks with equal digests are equal."""
        sha = hashlib.sha256(f"{self.known.shape}\n".encode())
        sha.update(np.packbits(self.known).tobytes())
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the mask as JSON, using one bit per entry.

        Raises:
            OutputError: If the file cannot be written. An existing file is left unchanged.
        """
        record = {
            "format": _FORMAT,
            "table_digest": self.table_digest,
            "digest": self.digest,
            "fraction": self.fraction,
            "seed": self.seed,
            "shape": list(self.known.shape),
            "known": base64.b64encode(np.packbits(self.known).tobytes()).decode("ascii"),
        }
        with replacing(Path(path)) as draft:
            draft.write_text(json.dumps(record) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, table: AnnotationTable) -> LabelMask:
        """Reads a mask that was written by :meth:`save`.

        Raises:
            DataError: If the file is missing, is not a label mask, was modified, or belongs to another table.
        """
        record = _read(Path(path))
        digest = check_table(path, "label mask", record["table_digest"], table)
        try:
            packed = np.frombuffer(base64.b64decode(record["known"], validate=True), np.uint8)
            if record["shape"] != list(table.labels.shape) or len(packed) != -(-table.labels.size // 8):
                raise ValueError(f"it does not have {table.labels.shape[0]} x {table.labels.shape[1]} entries")
        except (TypeError, ValueError, binascii.Error) as error:
            raise DataError(f"{path}: the file cannot be read as a label mask ({error}); draw it again") from error
        known = np.unpackbits(packed, count=table.labels.size).astype(bool).reshape(table.labels.shape)
        mask = cls(known, digest, record["fraction"], record["seed"])
        check_unchanged(path, "label mask", "entries", mask.digest, record["digest"])
        return mask


def make_mask(table: AnnotationTable, *, file: str | None, fraction: float | None, seed: int) -> LabelMask | None:
    """Returns the label mask for the given settings, or None if no mask is configured.

    Raises:
        DataError: If the file belongs to another table.
        ConfigError: If both are given, or no label would remain known.
    """
    if file is not None and fraction is not None:
        raise ConfigError("known_file and known_fraction both specify the known labels: use only one of them.")
    if file is not None:
        return LabelMask.load(file, table)
    if fraction is None:
        return None
    mask = LabelMask.draw(table, fraction, seed)
    if not (mask.known & (table.labels != UNKNOWN)).any():
        raise ConfigError(
            f"known_fraction {fraction} of {len(table)} x {table.num_classes} labels leaves no known label; use a "
            "larger fraction."
        )
    return mask


def with_known_labels(
    table: AnnotationTable, mask: LabelMask | None, unknown_as_absent: bool = False
) -> tuple[AnnotationTable, str]:
    """Returns the table with the labels that are available for training, and a message for the user.

    If a class has known positives but no known negatives, its unknown labels in labeled images are treated as negative.
    Otherwise, its positive rate would be 1, and every image would become a pseudo-positive. If only single positive
    labels are known, this applies to all classes.

    Args:
        table: The table with all annotated labels.
        mask: Mask of known labels. None keeps all labels.
        unknown_as_absent: Whether to treat unknown labels of labeled images as negative for all classes.
    """
    table = table if mask is None else mask(table)
    labels = table.labels
    positives_only = (labels == POSITIVE).any(axis=0) & ~(labels == NEGATIVE).any(axis=0)
    changed = (labels == UNKNOWN) & (labels > UNKNOWN).any(axis=1, keepdims=True)
    if not unknown_as_absent:
        changed &= positives_only
    if not changed.any():
        return table, ""
    told = ""
    if not unknown_as_absent:
        names = [name for name, some in zip(table.class_names, changed.any(axis=0), strict=True) if some]
        told = (
            f"{len(names)} of {table.num_classes} classes have known positives but no known negative: {listed(names)}. "
            "In labeled images, unknown labels of these classes are treated as negative. To allow an estimate of the "
            "frequency of each class, label some images as negative (docs/reference/data.md)."
        )
    return dataclasses.replace(table, labels=np.where(changed, np.int8(NEGATIVE), labels)), told


def _read(path: Path) -> dict[str, Any]:
    record = read_draw(path, "label mask", "label mask not found; correct the path or draw a new mask")
    needed = ("table_digest", "digest", "fraction", "seed", "shape", "known")
    if not isinstance(record, dict) or record.get("format") != _FORMAT or any(key not in record for key in needed):
        raise DataError(f"{path}: the file is not a valid label mask; draw a new mask")
    return record
