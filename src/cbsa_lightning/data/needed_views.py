"""Selects the views that a feature cache stores for a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.splits import Split

PLAIN, MIRRORED, STRONG = 0, 1, 2
"""Columns of a table of views: the plain view, its mirror image, and the first strong view."""


def needed_views(
    split: Split, images: int, partly: NDArray[np.int64], strong_views: int, labels_alone: bool
) -> NDArray[np.bool_]:
    """Selects the views of the training table to store, ``(images, 2 + strong_views)`` bool.

    These are plain views of all images that the run uses, mirrored views of the images with unknown labels, and
    strong views of the images that it trains on. For a test table, only plain views are stored.

    Args:
        split: Rows of the training table.
        images: Number of rows of the table.
        partly: Labeled rows with unknown entries.
        strong_views: Strong views stored per image.
        labels_alone: Whether the run ignores unlabeled images.
    """
    unlabeled = np.empty(0, np.int64) if labels_alone else split.unlabeled
    trained = np.concatenate([split.labeled, unlabeled])
    needed = np.zeros((images, STRONG + strong_views), dtype=bool)
    needed[trained, STRONG:] = True
    needed[unlabeled, MIRRORED] = True
    needed[partly, MIRRORED] = not labels_alone
    needed[np.concatenate([trained, split.held_out]), PLAIN] = True
    return needed
