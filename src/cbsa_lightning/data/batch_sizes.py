"""How many images of which kind a training step has, and how many steps an epoch has."""

from __future__ import annotations

from cbsa_lightning.errors import ConfigError

CAP_BATCH = 64
"""Images a step in CAP; its batch composition and warm-up batch are stated relative to it (facts B1, D2-19, D2-20)."""


def default_labelled_per_batch(labelled_share: float, batch_size: int) -> int:
    """Labelled images in a batch of the semi-supervised stage, by CAP's rule.

    Args:
        labelled_share: p, the share of the training images that are labelled.
        batch_size: B, labelled and unlabelled images together.
    """
    return min(max(1, int(1.25 * labelled_share * batch_size + 0.5)), batch_size - 1)


def default_warmup_batch_size(labelled_share: float, batch_size: int) -> int:
    """Images in a batch of labelled images only, by CAP's rule: 16 for p = .05 to 64 for p = .20, at most B."""
    return max(1, min(batch_size, round(5 * labelled_share * CAP_BATCH)))


def check_batch(batch_size: int, labelled_per_batch: int) -> None:
    """Refuses a batch without room for both kinds of images.

    Raises:
        ConfigError: Naming the bounds.
    """
    if batch_size < 2:
        raise ConfigError(f"batch_size must be at least 2 (one labelled, one unlabelled), got {batch_size}.")
    if not 0 < labelled_per_batch < batch_size:
        raise ConfigError(
            f"labelled_per_batch must lie between 1 and batch_size - 1 = {batch_size - 1}, got {labelled_per_batch}."
        )


def steps_per_epoch(images: int, per_batch: int, least: int = 1) -> int:
    """Steps of one pass over some images, but ``least`` or more: a smaller set is then passed several times."""
    return max(least, -(-images // per_batch))
