"""Number of images of each kind per training step, and number of steps per epoch."""

from __future__ import annotations

from cbsa_lightning.errors import ConfigError

CAP_BATCH = 64
"""CAP's batch size, on which its rules for the composition of batches and for the warm-up are based."""


def default_labeled_per_batch(labeled_share: float, batch_size: int) -> int:
    """Returns the number of labeled images in a batch of the semi-supervised stage.

    Up to p = 2/3, this is CAP's rule, 1.25 p B. For a larger p, the fraction of unlabeled images in a batch is half of
    their fraction in the training set. An epoch is one pass over the unlabeled images, and therefore never has more
    than about 2 n / B steps for n training images.

    Args:
        labeled_share: p, the labeled fraction of the training images.
        batch_size: B, the number of labeled and unlabeled images in a batch.
    """
    fraction = min(1.25 * labeled_share, (1 + labeled_share) / 2)
    return min(max(1, int(fraction * batch_size + 0.5)), batch_size - 1)


def default_warmup_batch_size(labeled_share: float, batch_size: int) -> int:
    """Returns the batch size of the warm-up by CAP's rule, from 16 for p = .05 to 64 for p = .20, but at most B."""
    return max(1, min(batch_size, round(5 * labeled_share * CAP_BATCH)))


def check_batch(batch_size: int, labeled_per_batch: int) -> None:
    """Checks that a batch can contain both labeled and unlabeled images.

    Raises:
        ConfigError: If a size is out of range. The message states the valid range.
    """
    if batch_size < 2:
        raise ConfigError(f"batch_size must be at least 2 (one labeled, one unlabeled), got {batch_size}.")
    if not 0 < labeled_per_batch < batch_size:
        raise ConfigError(
            f"labeled_per_batch must be between 1 and batch_size - 1 = {batch_size - 1}, got {labeled_per_batch}."
        )


def steps_per_epoch(images: int, per_batch: int, least: int = 1) -> int:
    """Returns the number of steps of one pass, or ``least`` if this is larger. Small sets then need several passes."""
    return max(least, -(-images // per_batch))


def labeled_only_steps(
    labeled: int, unlabeled: int, partly_labeled: int, batch_size: int, labeled_per_batch: int, least: int = 1
) -> int:
    """Returns the number of steps per epoch of a second stage that uses only labels.

    It equals the number of steps of the semi-supervised stage, so that both stages are comparable. If there are partly
    labeled images, an epoch is one pass over all training images, regardless of how many labels are known.

    Args:
        labeled: Number of images with known labels.
        unlabeled: Number of images without known labels.
        partly_labeled: Number of labeled images with unknown labels.
        batch_size: B, the batch size of the semi-supervised stage.
        labeled_per_batch: Number of labeled images in a batch of that stage.
        least: Minimum number of steps.
    """
    if partly_labeled or not unlabeled:
        return steps_per_epoch(labeled + unlabeled, batch_size, least)
    return steps_per_epoch(unlabeled, batch_size - labeled_per_batch, least)
