"""Selection of the views that a feature cache stores for a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cbsa_lightning.data.splits import Split

PLAIN, MIRRORED, STRONG = 0, 1, 2
"""Columns of the plain view, its mirror image, and the first strong view in an array of views."""


def needed_views(
    split: Split, images: int, partly: NDArray[np.int64], strong_views: int, labels_alone: bool
) -> NDArray[np.bool_]:
    """Selects the views of the training table that are stored, ``(images, 2 + strong_views)`` bool.

    They are the plain views of all images that the run uses, the mirrored views of images with unknown labels, and the
    strong views of the images that are used for training. For a test table, only plain views are stored.

    Args:
        split: Rows of the training table.
        images: Number of rows of the training table.
        partly: Labeled rows with unknown labels.
        strong_views: Number of strong views per image.
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
