"""What a data set holds and what is wrong with it, found without training: ``cbsa check`` as a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import NEGATIVE, POSITIVE, UNKNOWN, AnnotationTable, blocks
from cbsa_lightning.data.plan import Plan, RunSettings, make_plan
from cbsa_lightning.data.spelling import similar_names
from cbsa_lightning.data.survey import SMALLEST, Survey, equal_rows, survey
from cbsa_lightning.errors import CBSAError

Rows = NDArray[np.int64]


class Item(NamedTuple):
    """One thing that a finding is about.

    Attributes:
        names: A path, the paths of equal images, a class, or two similar classes.
        note: What is to be said of it, or "".
    """

    names: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Finding:
    """One kind of fault, with everything that has it.

    Attributes:
        kind: Its name for programs: "missing", "unreadable", "leak", "refused", "misnamed", "tiny", "duplicate",
            "held_out_duplicate", "similar_classes" or "class_without_positive".
        message: What was found and what to do about it.
        count: How many items there are.
        items: Makes them one after another, so that a million of them take no memory.
    """

    kind: str
    message: str
    count: int = 0
    items: Callable[[], Iterable[Item]] = tuple


@dataclass(frozen=True)
class Counts:
    """Images of a table by what is known of them.

    Attributes:
        images: All of them.
        labelled: Something is known of any class.
        empty: Of the labelled ones, those that show no class: all are absent.
        partly: Of the labelled ones, those of which some classes are unknown.
        unlabelled: Nothing is known.
        positives: Positives of each class, in the order of the classes.
        negatives: Negatives of each class.
    """

    images: int
    labelled: int
    empty: int
    partly: int
    unlabelled: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Report:
    """What :func:`check` found.

    Attributes:
        class_names: The C classes; empty where the annotations cannot be read.
        train: Counts of the training table, or None where it cannot be read.
        test: Counts of the test table, or None.
        plan: What a run would do, or None where it would stop.
        errors: What ``cbsa fit`` would refuse, and test images that are training images too.
        warnings: What it would accept.
    """

    class_names: tuple[str, ...] = ()
    train: Counts | None = None
    test: Counts | None = None
    plan: Plan | None = None
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def fewest_first(self) -> list[tuple[str, int]]:
        """Classes with their positives in the training table, the rarest first."""
        positives = self.train.positives if self.train is not None else ()
        return sorted(zip(self.class_names, positives, strict=True), key=lambda pair: pair[1])


def refused(error: CBSAError) -> Report:
    """The report of a data set that cannot be read at all."""
    return Report(errors=[Finding("refused", str(error))])


def check(train: AnnotationTable, test: AnnotationTable | None = None, settings: RunSettings | None = None) -> Report:
    """Checks a data set: labels, class names, image files, and what a run would do.

    Every image file is read once. Nothing is changed and nothing is written.

    Args:
        train: The training images.
        test: The test images, if there are any.
        settings: Of the run; default: those of the data module.
    """
    settings = settings or RunSettings()
    plan, errors = None, []
    try:
        plan = make_plan(train, test, settings)
    except CBSAError as error:
        errors.append(Finding("refused", str(error)))
    tables = [train] if test is None else [train, test]
    surveys = [survey(table) for table in tables]
    warnings = list(_class_findings(train, plan))
    for finding in _file_findings(tables, surveys):
        stops = finding.kind == "missing" or (finding.kind == "unreadable" and settings.on_error == "stop")
        (errors if stops else warnings).append(finding)
    for finding in _equal_images(tables, surveys, plan):
        (errors if finding.kind == "leak" else warnings).append(finding)
    counted = [count_labels(table.labels) for table in tables]
    return Report(train.class_names, counted[0], counted[1] if test is not None else None, plan, errors, warnings)


def count_labels(labels: NDArray[np.int8]) -> Counts:
    """Counts rows by what is known of them, a few at a time.

    Args:
        labels: (n, C) of 1 present, 0 absent, -1 unknown.
    """
    rows = np.zeros(3, np.int64)
    classes = np.zeros((2, labels.shape[1]), np.int64)
    for block in blocks(labels):
        known = (block != UNKNOWN).sum(axis=1)
        absent = (block == NEGATIVE).sum(axis=1)
        complete = known == labels.shape[1]
        rows += [np.count_nonzero(found) for found in (known > 0, absent == labels.shape[1], (known > 0) & ~complete)]
        classes += (block == POSITIVE).sum(axis=0), (block == NEGATIVE).sum(axis=0)
    labelled, empty, partly = map(int, rows)
    positives, negatives = (tuple(counts.tolist()) for counts in classes)
    return Counts(len(labels), labelled, empty, partly, len(labels) - labelled, positives, negatives)


def _class_findings(train: AnnotationTable, plan: Plan | None) -> Iterator[Finding]:
    if pairs := similar_names(train.class_names):
        message = "Class names that are nearly the same; if they mean one class, write them alike."
        yield Finding("similar_classes", message, len(pairs), lambda: [Item(pair) for pair in pairs])
    if plan is not None:
        positives = sum((train.labels[rows] == POSITIVE).sum(axis=0) for rows in blocks(plan.split.labelled))
        lacking = [name for name, count in zip(train.class_names, positives, strict=True) if not count]
        if lacking:
            message = (
                "Classes without a positive among the labelled images that are trained on; label some, or take the "
                "class out."
            )
            yield Finding("class_without_positive", message, len(lacking), lambda: [Item((name,)) for name in lacking])


def _file_findings(tables: Sequence[AnnotationTable], surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Findings on single files, those of all tables together."""
    kinds: dict[str, tuple[str, Callable[[AnnotationTable, Survey, int], str]]] = {
        "missing": ("Images that are not there; put the files there, or correct the root.", partial(_other_case, {})),
        "unreadable": ("Images that cannot be read; fetch them again, or take them out.", _reason),
        "misnamed": ("Images of another format than their suffix says.", lambda t, s, i: f"is {s.kind_of(i)}"),
        "tiny": (f"Images with a side below {SMALLEST} pixels; they show little.", lambda *_: ""),
    }
    for kind, (message, note) in kinds.items():
        found = [np.flatnonzero(getattr(part, kind)) for part in surveys]
        if count := sum(map(len, found)):
            yield Finding(kind, message, count, partial(_files, tables, surveys, found, note))


def _files(
    tables: Sequence[AnnotationTable],
    surveys: Sequence[Survey],
    found: Sequence[Rows],
    note: Callable[[AnnotationTable, Survey, int], str],
) -> Iterator[Item]:
    for table, part, rows in zip(tables, surveys, found, strict=True):
        for row in map(int, rows):
            yield Item((str(table.file(row)),), note(table, part, row))


def _other_case(folders: dict[Path, dict[str, str]], table: AnnotationTable, _: Survey, row: int) -> str:
    """Whether the file is there under a name of other case, such as IMG.JPG; ``folders`` keeps what was listed."""
    file = table.file(row)
    if file.parent not in folders:
        try:
            folders[file.parent] = {name.casefold(): name for name in os.listdir(file.parent)}
        except (OSError, ValueError):  # ValueError: a name that no folder can have
            folders[file.parent] = {}
    name = folders[file.parent].get(file.name.casefold())
    return f"there is {name}" if name else ""


def _reason(table: AnnotationTable, part: Survey, row: int) -> str:
    return part.reasons.get(row, "").removeprefix(f"{table.file(row)}: ")


def _equal_images(tables: Sequence[AnnotationTable], surveys: Sequence[Survey], plan: Plan | None) -> Iterator[Finding]:
    """Findings on images with the same content; rows of the test table count on from those of the training table."""
    n = len(tables[0])
    readable = np.flatnonzero(np.concatenate([part.readable for part in surveys]))
    groups = equal_rows(np.concatenate([part.digest for part in surveys]), readable)
    held_out = np.zeros(n, dtype=bool)
    if plan is not None:
        held_out[plan.split.held_out] = True
    found: dict[str, list[Rows]] = {"leak": [], "held_out_duplicate": [], "duplicate": []}
    for group in groups:
        inside = group[group < n]
        leaks = 0 < len(inside) < len(group)
        across = len(inside) and 0 < np.count_nonzero(held_out[inside]) < len(inside)
        kind = "leak" if leaks else "held_out_duplicate" if across else "duplicate"
        found[kind].append(group)
    messages = {
        "leak": "Test images that are training images too; a score on them says nothing. Take them out of one table.",
        "held_out_duplicate": "Images that are both held out for validation and trained on, under two names; the "
        "validation score is too high. Keep one of each.",
        "duplicate": "The same image under several names; keep one of each.",
    }

    def items(kind: str) -> Iterator[Item]:
        for group in found[kind]:
            files = tuple(str(tables[0].file(i) if i < n else tables[1].file(i - n)) for i in map(int, group))
            yield Item(files, "labels differ" if _contradict(tables[0].labels[group[group < n]]) else "")

    for kind, message in messages.items():
        if found[kind]:
            yield Finding(kind, message, len(found[kind]), partial(items, kind))


def _contradict(labels: NDArray[np.int8]) -> bool:
    """Whether some class is present in one row and absent in another."""
    return bool(((labels == POSITIVE).any(axis=0) & (labels == NEGATIVE).any(axis=0)).any())
