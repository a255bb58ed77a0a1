"""Answers of one or more annotators for an image, and the labels that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import UNKNOWN
from cbsa_lightning.data.class_names import clean_name, did_you_mean
from cbsa_lightning.data.readers.structured import counted
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief

Disagreement = Literal["unknown", "majority"]
NOTHING = -1  # instead of the position of a class


@dataclass(frozen=True)
class Record:
    """One image of an export.

    Attributes:
        image: Its path relative to the root.
        where: File and record, for a message.
        answers: The labels of each submitted answer; all other classes are absent. Without answers, it is unlabeled.
        test: Whether the export marks the image as a test image.
    """

    image: str
    where: str
    answers: Sequence[Sequence[str]]
    test: bool = False


def codes_of(answer: Sequence[str], record: Record, position: Mapping[str, int]) -> list[int]:
    """Returns the positions of the classes that an answer names; empty if its label means nothing.

    Raises:
        DataError: If a label is not a class, or one that means nothing occurs together with a class.
    """
    labels = [clean_name(label) for label in answer]
    if unknown := [f"{brief(label)}{did_you_mean(label, position)}" for label in labels if label not in position]:
        raise DataError(
            f"{record.where}: labels that are not in the class list: {listed(unknown)}; correct them, or add them to "
            "the class list"
        )
    codes = sorted({position[label] for label in labels})
    if NOTHING in codes[:1]:
        if len(codes) > 1:
            found = listed(map(brief, labels))
            raise DataError(
                f"{record.where}: a label that means nothing, together with others: {found}; keep one of the two"
            )
        return []
    return codes


def decide(
    rows: Sequence[int],
    coded: Sequence[Sequence[Sequence[int]]],
    num_images: int,
    num_classes: int,
    disagreement: Disagreement | None,
) -> tuple[NDArray[np.int8], list[str]]:
    """Decides labels from the answers for each image.

    Args:
        rows: Image of each record.
        coded: For each record and each of its answers, the positions of the classes that it names.
        num_images: n.
        num_classes: C.
        disagreement: Label of a class on which answers differ; None: unknown.

    Returns:
        (n, C) labels, -1 for all classes of an image without an answer; and notes on how they were decided.
    """
    yes = np.zeros((num_images, num_classes), dtype=np.int32)
    answers = np.zeros((num_images, 1), dtype=np.int32)
    for i, of_record in zip(rows, coded, strict=True):
        for codes in of_record:
            yes[i, codes] += 1
            answers[i] += 1
    no = answers - yes
    differ = (yes > 0) & (no > 0)
    labels = np.where(answers == 0, UNKNOWN, yes > 0).astype(np.int8)
    labels[differ] = UNKNOWN
    if disagreement == "majority":
        decided = differ & (yes != no)
        labels[decided] = (yes > no)[decided]
    notes = []
    if several := int((answers > 1).sum()):
        notes.append(f"{counted(several, 'image')} with several answers, which are combined")
    if cells := int(differ.sum()):
        unknown = int((differ & (labels == UNKNOWN)).sum())
        where = counted(int(differ.any(axis=1).sum()), "image")
        notes.append(
            f"{counted(cells, 'label')} of {where} on which answers differ: {unknown:,} unknown, "
            f"{cells - unknown:,} by the majority"
        )
    return labels, notes
