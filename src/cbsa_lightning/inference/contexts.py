"""Context probabilities of images, from the context head of a trained network (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.feature_batches import feature_batches


def context_probabilities(classifier: Classifier, images: Sequence[Any], batch_size: int = 64) -> Tensor:
    """Computes the probability of each context.

    Args:
        classifier: Classifier whose network has a context head.
        images: The n images; see :data:`~cbsa_lightning.inference.classifier.Images`.
        batch_size: Number of images per forward pass.

    Returns:
        ``(n, K)`` float32 on the CPU; each row sums to 1.

    Raises:
        DataError: If the network has no context head, there are no images, or an image cannot be read.
    """
    if not classifier.network.num_contexts:
        raise DataError("The network has no context head. Use a model that was trained with num_contexts above 0.")
    if not len(images):
        raise DataError("There are no images; pass at least one.")
    parts = []
    for _, features in feature_batches(classifier, images, batch_size, "Contexts"):
        with torch.no_grad():
            logits = classifier.network(features, classifier.text).context_logits
        parts.append(logits.float().softmax(1).cpu())
    return torch.cat(parts)
