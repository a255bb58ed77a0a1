"""Problems of a data set, with their remedies and the affected images or classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import NEGATIVE, POSITIVE, UNKNOWN, AnnotationTable, blocks
from cbsa_lightning.data.checks.spelling import similar_names
from cbsa_lightning.data.checks.survey import SMALLEST, Survey
from cbsa_lightning.data.plan import Plan

if TYPE_CHECKING:
    from cbsa_lightning.data.checks.near_duplicates import Similar  # imports torch

Rows = NDArray[np.int64]


class Item(NamedTuple):
    """An image, class, or group of images or classes that a finding refers to.

    Attributes:
        names: A path, the paths of equal images, a class, or two similar classes.
        note: A remark on the item, or "" if there is none.
    """

    names: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Finding:
    """A kind of problem with all affected items.

    Attributes:
        kind: Machine-readable name: "missing", "unreadable", "leak", "refused", "misnamed", "tiny", "duplicate",
            "held_out_duplicate", "near_duplicate", "similar_classes", "class_without_positive",
            "class_without_negative" or "class_without_label".
        message: Description of the problem and its remedy.
        count: Number of items.
        items: Function that yields the items one by one, to save memory if there are millions of them.
    """

    kind: str
    message: str
    count: int = 0
    items: Callable[[], Iterable[Item]] = tuple


def class_findings(train: AnnotationTable, plan: Plan | None) -> Iterator[Finding]:
    """Yields findings about class names and about labels of classes."""
    if pairs := similar_names(train.class_names):
        message = "Class names that are nearly the same; if they refer to the same class, use one spelling."
        yield Finding("similar_classes", message, len(pairs), lambda: [Item(pair) for pair in pairs])
    if plan is not None:
        labeled = list(blocks(plan.split.labeled))
        positives = sum((train.labels[rows] == POSITIVE).sum(axis=0) for rows in labeled)
        known = sum((train.labels[rows] != UNKNOWN).sum(axis=0) for rows in labeled)
        unknown = [name for name, count in zip(train.class_names, known, strict=True) if not count]
        if unknown:
            message = (
                "Classes without known labels in the labeled images used for training. They do not receive "
                "pseudo-positives and are not included in any metric. Label some images, or remove the class."
            )
            yield Finding("class_without_label", message, len(unknown), lambda: [Item((name,)) for name in unknown])
        counts = zip(train.class_names, positives, known, strict=True)
        lacking = [name for name, count, entries in counts if entries and not count]
        if lacking:
            message = (
                "Classes without positives in the labeled images used for training; label some images, or remove the "
                "class."
            )
            yield Finding("class_without_positive", message, len(lacking), lambda: [Item((name,)) for name in lacking])


def file_findings(tables: Sequence[AnnotationTable], surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Yields findings about individual files of all tables."""
    kinds: dict[str, tuple[str, Callable[[AnnotationTable, Survey, int], str]]] = {
        "missing": ("Images that do not exist; put the files there, or correct the root.", partial(_other_case, {})),
        "unreadable": ("Images that cannot be read; download or copy them again, or remove them.", _reason),
        "misnamed": ("Images whose format differs from their suffix.", lambda t, s, i: f"is {s.kind_of(i)}"),
        "tiny": (f"Images with a side below {SMALLEST} pixels, which contain little information.", lambda *_: ""),
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
    """Finds a file whose name differs only in case, such as IMG.JPG. ``folders`` caches listings of folders."""
    file = table.file(row)
    if file.parent not in folders:
        try:
            folders[file.parent] = {name.casefold(): name for name in os.listdir(file.parent)}
        except (OSError, ValueError):  # ValueError: an invalid folder name
            folders[file.parent] = {}
    name = folders[file.parent].get(file.name.casefold())
    return f"there is {name}" if name else ""


def _reason(table: AnnotationTable, part: Survey, row: int) -> str:
    return part.reasons.get(row, "").removeprefix(f"{table.file(row)}: ")


def file_of(tables: Sequence[AnnotationTable], row: int) -> Path:
    """Returns the image file of a row. Rows of the test table follow those of the training table."""
    n = len(tables[0])
    return tables[0].file(row) if row < n else tables[1].file(row - n)


def equal_images(tables: Sequence[AnnotationTable], groups: Sequence[Rows], plan: Plan | None) -> Iterator[Finding]:
    """Yields findings about groups of images with equal content."""
    n = len(tables[0])
    held_out = np.zeros(n, dtype=bool)
    if plan is not None:
        held_out[plan.split.held_out] = True
    found: dict[str, list[Rows]] = {"leak": [], "held_out_duplicate": [], "duplicate": []}
    for group in groups:
        inside = group[group < n]
        leaks = 0 < len(inside) < len(group)
        across = 0 < np.count_nonzero(held_out[inside]) < len(inside)
        found["leak" if leaks else "held_out_duplicate" if across else "duplicate"].append(group)
    messages = {
        "leak": "Test images that are also training images, so the test score is not meaningful. Remove them from one "
        "table.",
        "held_out_duplicate": "Images that are used both for validation and, under another name, for training, so the "
        "validation score is too high. Keep one of each.",
        "duplicate": "Identical images with different names; keep one of each.",
    }

    def items(kind: str) -> Iterator[Item]:
        for group in found[kind]:
            files = tuple(str(file_of(tables, row)) for row in map(int, group))
            yield Item(files, "labels differ" if _contradict(tables[0].labels[group[group < n]]) else "")

    for kind, message in messages.items():
        if found[kind]:
            yield Finding(kind, message, len(found[kind]), partial(items, kind))


def similar_images(files: Sequence[Path], found: Similar) -> Iterator[Finding]:
    """Yields findings from a comparison of ``files``."""
    if found.pairs:
        pairs = [Item((str(files[i]), str(files[j])), f"similarity {cosine:.2f}") for i, j, cosine in found.pairs]
        message = (
            "Images that are nearly identical; keep one of each, and do not use one for training and another for "
            "testing."
        )
        yield Finding("near_duplicate", message, len(pairs), lambda: pairs)
    if found.unread:
        items = [Item((str(files[i]),), why.removeprefix(f"{files[i]}: ")) for i, why in sorted(found.unread.items())]
        message = "Images whose files are damaged; download or copy them again, or remove them."
        yield Finding("unreadable", message, len(items), lambda: items)


def _contradict(labels: NDArray[np.int8]) -> bool:
    """Returns whether a class is present in one row and absent in another."""
    return bool(((labels == POSITIVE).any(axis=0) & (labels == NEGATIVE).any(axis=0)).any())
