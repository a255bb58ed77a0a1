"""Answers of one or more annotators for an image, and the labels that are derived from them."""

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
NOTHING = -1  # used instead of the position of a class


@dataclass(frozen=True)
class Record:
    """One image in the export of a labeling tool.

    Attributes:
        image: Path of the image, relative to the root.
        where: File and record, for error messages.
        answers: The labels of each submitted answer. All other classes are absent. Without answers, the image is
            unlabeled.
        test: Whether the export marks the image as a test image.
    """

    image: str
    where: str
    answers: Sequence[Sequence[str]]
    test: bool = False


def codes_of(answer: Sequence[str], record: Record, position: Mapping[str, int]) -> list[int]:
    """Returns the positions of the classes in an answer, or no positions if its label means "shows no class".

    Raises:
        DataError: If a label is not a class, or a label for "shows no class" occurs together with a class.
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
                f"{record.where}: a label for 'shows no class' occurs together with others: {found}; keep "
                "one of the two"
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
    """Derives the labels of each image from its answers.

    Args:
        rows: Row of the image of each record.
        coded: Positions of the classes that are named by each answer of each record.
        num_images: n, the number of images.
        num_classes: C, the number of classes.
        disagreement: Label of a class for which answers differ. None means unknown.

    Returns:
        Labels (n, C), which are -1 for images without an answer, and notes on how they were derived.
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
