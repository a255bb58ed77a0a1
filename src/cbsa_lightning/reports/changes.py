"""Changes from an earlier run to a new one, in the average precision on the same images and in the labels."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbsa_lightning.data.labeled_images import LabeledImages
from cbsa_lightning.io.files import replacing
from cbsa_lightning.method.metrics import MultilabelReport

FEWEST_POSITIVES = 3
COLUMNS = (
    "class",
    "AP_before",
    "AP_after",
    "AP_points",
    "positives",
    "labeled_before",
    "labeled_now",
    "labels_added",
    "labels_removed",
)
_SHOWN = 5
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Changes:
    """Changes of each class, in the order of the new run, followed by classes that only the earlier run has.

    Attributes:
        class_names: The C classes.
        before: ``(C,)``, average precision of the earlier run's model; NaN if it was not measured.
        after: ``(C,)``, average precision of the new model on the same images.
        positives: ``(C,)``, number of positives among these images.
        labeled: ``(C, 4)``, number of labeled positives before and now, and the numbers added and removed; None if the
            labels of the earlier run are unknown.
        num_images: Number of images on which both models are evaluated.
        left_out: Number of validation images that are skipped because the earlier run was trained on their labels.
    """

    class_names: list[str]
    before: Floats
    after: Floats
    positives: Counts
    labeled: Counts | None
    num_images: int
    left_out: int

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Mask ``(C,)`` of the classes whose average precision is known for both models."""
        return ~(np.isnan(self.before) | np.isnan(self.after))

    @property
    def points(self) -> Floats:
        """Change ``(C,)`` in the AP of each class, in points."""
        return 100 * (self.after - self.before)

    def sentences(self) -> list[str]:
        """Describes the changes, one sentence per line."""
        told = [f"Measured on {self.num_images} validation images that neither run was trained on"]
        if self.left_out:
            told[0] += f" ({self.left_out} are skipped, since the earlier run was trained on their labels)"
        told[0] += "."
        found = self.measured
        if not found.any():
            told.append(f"mAP is not measured, since no shared class has {FEWEST_POSITIVES} positives.")
        else:
            before, after = 100 * self.before[found].mean(), 100 * self.after[found].mean()
            told.append(
                f"mAP: {before:.1f} before, {after:.1f} after, over the "
                f"{found.sum()} of {len(found)} classes with at least {FEWEST_POSITIVES} positives."
            )
            order = sorted(np.flatnonzero(found).tolist(), key=lambda k: -self.points[k])
            told += _most("Gained most", self, [k for k in order if self.points[k] > 0][:_SHOWN])
            told += _most("Lost most", self, [k for k in reversed(order) if self.points[k] < 0][:_SHOWN])
        if self.labeled is not None:
            before, now, added, removed = self.labeled.sum(0).tolist()
            told.append(f"Positive labels: {before} before, {now} now ({added} added, {removed} removed).")
        return told


def _most(what: str, changes: Changes, rows: Sequence[int]) -> list[str]:
    texts = [f"{changes.class_names[k]} {changes.points[k]:+.1f} ({changes.positives[k]} positives)" for k in rows]
    return [f"{what}, in points of AP: {', '.join(texts)}."] if texts else []


def class_AP(logits: Tensor, targets: Tensor) -> Floats:
    """Computes the average precision ``(C,)`` of each class.

    It is NaN for a class with fewer than :data:`FEWEST_POSITIVES` positives.

    Args:
        logits: ``(n, C)``.
        targets: ``(n, C)`` in {1, 0, -1 unknown}.
    """
    if not len(logits):
        return np.full(logits.shape[1], np.nan)
    report = MultilabelReport(logits.shape[1], FEWEST_POSITIVES)
    report.sync_on_compute = False  # every process has all images
    report.update(logits, targets)
    found: Floats = report.compute()["AP"].reshape(-1).double().numpy()
    return found


def in_order_of(names: Sequence[str], values: Tensor, of: Sequence[str]) -> Tensor:
    """Returns the columns ``(n, C)`` of ``values (n, len(of))`` for ``names``; NaN for names that are not in ``of``."""
    place = {name: k for k, name in enumerate(of)}
    result = torch.full((len(values), len(names)), math.nan)
    common = [k for k, name in enumerate(names) if name in place]
    result[:, common] = values[:, [place[names[k]] for k in common]]
    return result


def label_changes(names: Sequence[str], before: LabeledImages, now: LabeledImages) -> Counts:
    """Returns the labeled positives ``(C, 4)`` of the classes ``names``: before, now, added and removed.

    Images are matched by their path in the table or by their full path. A positive counts as added if it was not a
    positive before (even if the image was unlabeled then), and as removed if it is no longer a positive.
    """
    old, new = (in_order_of(names, torch.from_numpy(x.labels == 1).float(), x.class_names) for x in (before, now))
    old, new = old.nan_to_num().bool(), new.nan_to_num().bool()
    place = {path: i for i, path in enumerate(before.images)} | {path: i for i, path in enumerate(before.files)}
    matches = [place.get(f, place.get(i, -1)) for f, i in zip(now.files, now.images, strict=True)]
    match = torch.tensor(matches, dtype=torch.int64)
    both = torch.zeros_like(new)
    both[match >= 0] = new[match >= 0] & old[match[match >= 0]]
    kept = both.sum(0)
    counts: Counts = torch.stack([old.sum(0), new.sum(0), new.sum(0) - kept, old.sum(0) - kept], 1).numpy()
    return counts


def write_changes(path: Path, changes: Changes) -> None:
    """Writes one row per class; the cells of values that are unknown or were not measured are empty.

    Raises:
        OutputError: If the file cannot be written.
    """
    with replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for k, name in enumerate(changes.class_names):
            figures = (changes.before[k], changes.after[k], changes.points[k])
            labeled = ("",) * 4 if changes.labeled is None else changes.labeled[k].tolist()
            numbers = ["" if math.isnan(x) else f"{x:.4f}" for x in figures]
            writer.writerow([name, *numbers, int(changes.positives[k]), *labeled])
