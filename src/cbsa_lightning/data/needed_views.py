"""Which views of which images a feature cache keeps for a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.splits import Split

PLAIN, MIRRORED, STRONG = 0, 1, 2
"""Columns of a table of views: the plain view, its mirror image, then the strong ones."""


def needed_views(
    split: Split, images: int, partly: NDArray[np.int64], strong_views: int, labels_alone: bool
) -> NDArray[np.bool_]:
    """Returns which views of the training table are kept, ``(images, 2 + strong_views)`` bool.

    Plain views of all images that the run uses, mirrored ones of the images with unknown labels, and strong ones of
    those that it trains on. Of a test table the plain views are kept.

    Args:
        split: Rows of the training table.
        images: Rows that the table has.
        partly: Labeled rows with unknown entries.
        strong_views: Strong views kept of each image.
        labels_alone: Whether the run has no use for unlabeled images.
    """
    unlabeled = np.empty(0, np.int64) if labels_alone else split.unlabeled
    trained = np.concatenate([split.labeled, unlabeled])
    needed = np.zeros((images, STRONG + strong_views), dtype=bool)
    needed[trained, STRONG:] = True
    needed[unlabeled, MIRRORED] = True
    needed[partly, MIRRORED] = not labels_alone
    needed[np.concatenate([trained, split.held_out]), PLAIN] = True
    return needed
