"""Frozen features of images in batches, for computations that need more than the scores of a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cbsa_lightning.arguments import check_number
from cbsa_lightning.inference.classifier import Classifier


def feature_batches(
    classifier: Classifier, images: Sequence[Any], batch_size: int = 64, title: str = "Images"
) -> Iterator[tuple[slice, Tensor]]:
    """Computes the input of the network's forward pass, batch by batch, and shows the progress.

    Args:
        classifier: The classifier; its size and device are used.
        images: The images; see :data:`~cbsa_lightning.inference.classifier.Images`.
        batch_size: Number of images per batch.
        title: Title of the progress bar.

    Yields:
        The positions of the images in ``images``, and their features ``(B, ...)`` on the device of the classifier.

    Raises:
        DataError: If an image cannot be read; the message names it.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    with tqdm(total=len(images), desc=title, unit="image", leave=False) as bar:
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            views = torch.stack([classifier.view(image, start + i) for i, image in enumerate(part)])
            with torch.no_grad():
                features = classifier.network.features(views.to(classifier.device))
            yield slice(start, start + len(part)), features
            bar.update(len(part))
