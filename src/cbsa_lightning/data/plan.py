"""Plan of a run: the images used for training and validation, and the number of steps per epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.arguments import check_choice, check_number
from cbsa_lightning.data.annotations import POSITIVE, AnnotationTable
from cbsa_lightning.data.batch_sizes import (
    check_batch,
    default_labeled_per_batch,
    default_warmup_batch_size,
    labeled_only_steps,
    steps_per_epoch,
)
from cbsa_lightning.data.splits import Split, make_split, partly_labeled
from cbsa_lightning.errors import ConfigError, DataError


@dataclass(frozen=True)
class RunSettings:
    """Settings that determine how a run uses a data set, with the names and defaults of the data module.

    Attributes:
        labeled_only: Whether the run ignores unlabeled images.
        warmup_epochs: Number of epochs of the first stage, if known.
        max_epochs: Number of epochs of both stages, if known.

    Raises:
        ConfigError: If a number is out of range.
    """

    labeled_fraction: float | None = None
    split_file: str | None = None
    known_fraction: float | None = None
    known_file: str | None = None
    unknown_as_absent: bool = False
    held_out_fraction: float | None = None
    seed: int = 1
    batch_size: int = 64
    labeled_per_batch: int | None = None
    warmup_batch_size: int | None = None
    min_steps_per_epoch: int = 1
    on_error: Literal["stop", "skip"] = "stop"
    labeled_only: bool = False
    warmup_epochs: int | None = None
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("labeled_fraction", "held_out_fraction", "known_fraction"):
            if (share := getattr(self, name)) is not None:
                check_number(name, share, 0, 1)
        for name in ("batch_size", "warmup_batch_size", "min_steps_per_epoch"):
            if (number := getattr(self, name)) is not None:
                check_number(name, number, 1, whole=True)
        check_number("seed", self.seed, 0, (1 << 32) - 1, whole=True)
        check_choice("on_error", self.on_error, ("stop", "skip"))


@dataclass(frozen=True)
class Stage:
    """One of the two stages of training.

    Attributes:
        steps_per_epoch: Number of training steps per epoch.
        labeled: Number of labeled images per step.
        unlabeled: Number of unlabeled images per step.
        epochs: Number of epochs, if known.
    """

    steps_per_epoch: int
    labeled: int
    unlabeled: int
    epochs: int | None


@dataclass(frozen=True)
class Plan:
    """How a run uses its data set.

    Attributes:
        split: Rows of the training table.
        images: Number of rows of the training table.
        test_images: Number of rows of the test table, or 0 if there is none.
        validated_on: "held-out images" or "test images".
        validated: Number of images for validation.
        validated_classes: Number of classes with positives among these images. The mAP is the mean over these classes.
        warmup: The first stage, which uses only labeled images.
        second: The second stage.
        partly: Labeled rows that are used for training and have unknown labels.
    """

    split: Split
    images: int
    test_images: int
    validated_on: Literal["held-out images", "test images"]
    validated: int
    validated_classes: int
    warmup: Stage
    second: Stage
    partly: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


NOTHING_UNKNOWN = (
    "There are no unlabeled images and no unknown labels, so there is nothing to learn from except the labels. Add "
    "rows without labels, set labeled_fraction below 1, or train only on the labels (model labeler: LabeledOnly)."
)
_NONE = np.empty(0, dtype=np.int64)


def make_plan(
    train: AnnotationTable,
    test: AnnotationTable | None,
    settings: RunSettings,
    skipped: tuple[NDArray[np.int64], NDArray[np.int64]] = (_NONE, _NONE),
) -> Plan:
    """Plans how a run uses a data set.

    Args:
        train: The training images, with the labels that are available to the run.
        test: The test images, if any.
        settings: Settings of the run.
        skipped: Rows of both tables whose images are omitted because of ``on_error="skip"``.

    Raises:
        DataError: If there are no labeled or no unlabeled images, or a split file belongs to another table.
        ConfigError: If the settings leave no labeled, unlabeled or validation images, or a batch is too small.
    """
    split = make_split(
        train,
        file=settings.split_file,
        labeled_fraction=settings.labeled_fraction,
        held_out_fraction=settings.held_out_fraction,
        has_test=test is not None,
        seed=settings.seed,
    ).without(skipped[0])
    size, share = settings.batch_size, split.labeled_share
    labeled = settings.labeled_per_batch
    labeled = default_labeled_per_batch(share, size) if labeled is None else labeled
    check_batch(size, labeled)
    warmup = settings.warmup_batch_size or default_warmup_batch_size(share, size)
    if not len(split.labeled):
        raise DataError("There are no labeled images for training. Use another split_file, or omit it to draw a split.")
    partly = partly_labeled(train, split)
    if not len(split.unlabeled) and not len(partly) and not settings.labeled_only:
        raise DataError(NOTHING_UNKNOWN)
    tested = None if test is None else np.delete(test.labels, skipped[1], axis=0)
    if not len(split.held_out) and tested is None:
        raise ConfigError("There are no images for validation. Provide a test table or set held_out_fraction.")
    validated = train.labels[split.held_out] if len(split.held_out) or tested is None else tested
    if not len(validated):
        raise ConfigError("There are no images for validation: all test images are skipped. Repair some of them.")
    least, (first, other) = settings.min_steps_per_epoch, _epochs(settings)
    if settings.labeled_only:
        steps = labeled_only_steps(len(split.labeled), len(split.unlabeled), len(partly), size, labeled, least)
        second = Stage(steps, warmup, 0, other)
    elif not len(split.unlabeled):
        second = Stage(steps_per_epoch(len(split.labeled), size, least), size, 0, other)
    else:
        second = Stage(steps_per_epoch(len(split.unlabeled), size - labeled, least), labeled, size - labeled, other)
    return Plan(
        split,
        len(train),
        len(test) if test is not None else 0,
        "held-out images" if len(split.held_out) else "test images",
        len(validated),
        int(np.count_nonzero((validated == POSITIVE).any(axis=0))),
        Stage(steps_per_epoch(len(split.labeled), warmup, least), warmup, 0, first),
        second,
        _NONE if settings.labeled_only else partly,
    )


def _epochs(settings: RunSettings) -> tuple[int | None, int | None]:
    """Returns the number of epochs of each stage, or None if it is unknown."""
    warmup, most = settings.warmup_epochs, settings.max_epochs
    if warmup is None or most is None or most < 0:
        return warmup, None
    return min(warmup, most), max(most - warmup, 0)
