"""Computes the images of each kind per training step, and the steps per epoch."""

from __future__ import annotations

from cbsa_lightning.errors import ConfigError

CAP_BATCH = 64
"""CAP's batch size; its batch composition and warm-up batch are defined relative to it."""


def default_labeled_per_batch(labeled_share: float, batch_size: int) -> int:
    """Returns the labeled images in a batch of the semi-supervised stage: by CAP's rule 1.25 p B up to p = 2/3.

    For a larger p, half of the fraction of unlabeled images remains unlabeled, so that an epoch, one pass over them,
    never has more than about 2 n / B steps for n training images.

    Args:
        labeled_share: p, the labeled fraction of the training images.
        batch_size: B, labeled and unlabeled images together.
    """
    fraction = min(1.25 * labeled_share, (1 + labeled_share) / 2)
    return min(max(1, int(fraction * batch_size + 0.5)), batch_size - 1)


def default_warmup_batch_size(labeled_share: float, batch_size: int) -> int:
    """Returns the batch size of the warm-up, by CAP's rule: 16 for p = .05 to 64 for p = .20, at most B."""
    return max(1, min(batch_size, round(5 * labeled_share * CAP_BATCH)))


def check_batch(batch_size: int, labeled_per_batch: int) -> None:
    """Checks that a batch has room for both kinds of images.

    Raises:
        ConfigError: If it does not. The message names the bounds.
    """
    if batch_size < 2:
        raise ConfigError(f"batch_size must be at least 2 (one labeled, one unlabeled), got {batch_size}.")
    if not 0 < labeled_per_batch < batch_size:
        raise ConfigError(
            f"labeled_per_batch must be between 1 and batch_size - 1 = {batch_size - 1}, got {labeled_per_batch}."
        )


def steps_per_epoch(images: int, per_batch: int, least: int = 1) -> int:
    """Returns the steps of one pass, but at least ``least``: smaller sets are then passed several times."""
    return max(least, -(-images // per_batch))


def labeled_only_steps(
    labeled: int, unlabeled: int, partly_labeled: int, batch_size: int, labeled_per_batch: int, least: int = 1
) -> int:
    """Returns the steps per epoch of a second stage that trains on labels alone.

    These are the steps of the semi-supervised stage, so that both are comparable. With partly labeled images, an epoch
    is one pass over all training images: its length does not depend on how many labels are known.

    Args:
        labeled: Number of images with at least one known label.
        unlabeled: Number of images without any.
        partly_labeled: Number of labeled images with unknown labels.
        batch_size: B of the semi-supervised stage.
        labeled_per_batch: Labeled images in its batches.
        least: Minimum number of steps.
    """
    if partly_labeled or not unlabeled:
        return steps_per_epoch(labeled + unlabeled, batch_size, least)
    return steps_per_epoch(unlabeled, batch_size - labeled_per_batch, least)
