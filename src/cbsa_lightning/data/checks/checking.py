"""The implementation of ``cbsa check``, which summarizes a data set and reports its problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import NEGATIVE, POSITIVE, UNKNOWN, AnnotationTable, blocks
from cbsa_lightning.data.checks.findings import (
    Finding,
    class_findings,
    equal_images,
    file_findings,
    file_of,
    similar_images,
)
from cbsa_lightning.data.checks.run_time import RunTime
from cbsa_lightning.data.checks.survey import equal_rows, survey
from cbsa_lightning.data.label_masks import make_mask, with_known_labels
from cbsa_lightning.data.plan import Plan, RunSettings, make_plan
from cbsa_lightning.errors import CBSAError

if TYPE_CHECKING:
    from cbsa_lightning.data.checks.near_duplicates import Similar  # imports torch


@dataclass(frozen=True)
class Counts:
    """Numbers of images and labels in a table.

    Attributes:
        images: Number of images.
        labeled: Number of images with known labels.
        empty: Number of labeled images that show no class, because all classes are absent.
        partly: Number of labeled images with unknown labels.
        unlabeled: Number of images without known labels.
        positives: Number of positives of each class, in the order of the classes.
        negatives: Number of negatives of each class.
    """

    images: int
    labeled: int
    empty: int
    partly: int
    unlabeled: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Report:
    """Result of :func:`check`.

    Attributes:
        class_names: The C class names, or none if the annotations cannot be read.
        train: Counts of the training table, or None if it cannot be read.
        test: Counts of the test table, or None.
        plan: Plan of a run, or None if a run would stop with an error.
        errors: Problems that stop ``cbsa fit``, and test images that are also training images.
        warnings: Problems that do not stop ``cbsa fit``.
        notes: Remarks of the reader about the files.
        time: Estimated time of the run, or None if it was not measured.
    """

    class_names: tuple[str, ...] = ()
    train: Counts | None = None
    test: Counts | None = None
    plan: Plan | None = None
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    time: RunTime | None = None

    def fewest_first(self) -> list[tuple[str, int]]:
        """Classes with their number of positives in the training table, in ascending order of this number."""
        positives = self.train.positives if self.train is not None else ()
        return sorted(zip(self.class_names, positives, strict=True), key=lambda pair: pair[1])


def refused(error: CBSAError) -> Report:
    """Returns the report of a data set that cannot be read."""
    return Report(errors=[Finding("refused", str(error))])


def check(
    train: AnnotationTable,
    test: AnnotationTable | None = None,
    settings: RunSettings | None = None,
    near_duplicates: Callable[[Sequence[Path]], Similar] | None = None,
) -> Report:
    """Checks the labels, class names and image files of a data set, and plans a run.

    Every image file is read once, and a second time if ``near_duplicates`` is given. No file is changed or written.

    Args:
        train: The training images.
        test: The test images, if any.
        settings: Settings of the run. None uses the defaults of the data module.
        near_duplicates: Function that compares images; see :mod:`cbsa_lightning.data.checks.near_duplicates`.
    """
    settings = settings or RunSettings()
    tables = [train] if test is None else [train, test]
    surveys = [survey(table) for table in tables]
    skips = settings.on_error == "skip"
    skipped = [np.flatnonzero(part.unreadable) if skips else np.empty(0, np.int64) for part in surveys]
    plan, errors = None, []
    warnings: list[Finding] = []
    try:
        mask = make_mask(train, file=settings.known_file, fraction=settings.known_fraction, seed=settings.seed)
        train, assumed = with_known_labels(train, mask, settings.unknown_as_absent)
        warnings += [Finding("class_without_negative", assumed)] if assumed else []
        plan = make_plan(train, test, settings, (skipped[0], skipped[-1]))
    except CBSAError as error:
        errors.append(Finding("refused", str(error)))
    warnings += class_findings(train, plan)
    for finding in file_findings(tables, surveys):
        stops = finding.kind == "missing" or (finding.kind == "unreadable" and settings.on_error == "stop")
        (errors if stops else warnings).append(finding)
    readable = np.flatnonzero(np.concatenate([part.readable for part in surveys]))
    groups = equal_rows(np.concatenate([part.digest for part in surveys]), readable)
    for finding in equal_images(tables, groups, plan):
        (errors if finding.kind == "leak" else warnings).append(finding)
    if near_duplicates is not None:
        different = np.setdiff1d(readable, np.concatenate([readable[:0], *(group[1:] for group in groups)]))
        files = [file_of(tables, row) for row in map(int, different)]
        for finding in similar_images(files, near_duplicates(files)):
            (errors if finding.kind == "unreadable" else warnings).append(finding)
    counted = [count_labels(table.labels) for table in (train, *tables[1:])]
    return Report(train.class_names, counted[0], counted[1] if test is not None else None, plan, errors, warnings)


def count_labels(labels: NDArray[np.int8]) -> Counts:
    """Counts images and labels in chunks of rows.

    Args:
        labels: (n, C), 1 for present, 0 for absent, -1 for unknown.
    """
    rows = np.zeros(3, np.int64)
    classes = np.zeros((2, labels.shape[1]), np.int64)
    for block in blocks(labels):
        known = (block != UNKNOWN).sum(axis=1)
        absent = (block == NEGATIVE).sum(axis=1)
        complete = known == labels.shape[1]
        rows += [np.count_nonzero(found) for found in (known > 0, absent == labels.shape[1], (known > 0) & ~complete)]
        classes += (block == POSITIVE).sum(axis=0), (block == NEGATIVE).sum(axis=0)
    labeled, empty, partly = map(int, rows)
    positives, negatives = (tuple(counts.tolist()) for counts in classes)
    return Counts(len(labels), labeled, empty, partly, len(labels) - labeled, positives, negatives)
