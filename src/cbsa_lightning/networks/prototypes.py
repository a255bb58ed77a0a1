"""Prototypes of labels: features that represent the known positives of a label.

Source: "Semantic-Aware Representation Blending for Multi-Label Image Recognition with Partial Labels" (SARB; Pu et al.,
AAAI 2022), repository HCPLab-SYSU/HCP-MLR-PL.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cbsa_lightning.networks.hooks import Moment, Seen


def due(moment: Moment, start_epoch: int, every: int) -> bool:
    """Returns whether an epoch computes prototypes: the first one that uses them, and every few epochs after it."""
    return moment.epoch >= start_epoch and (moment.epoch - start_epoch) % every == 0


def sampled_positives(labels: Tensor, most: int, moment: Moment) -> Tensor:
    """Returns known positives ``(m, C)`` bool of labels ``(m, C)``: all, or ``most`` random ones of a class."""
    have = labels == 1
    order = torch.rand(labels.shape, generator=moment.generator()).masked_fill_(~have, 2.0).argsort(0).argsort(0)
    return have & (order < most)


def clustered(seen: Seen, num_classes: int, number: int, moment: Moment) -> Tensor:
    """Returns the centers of k-means over the features of each class.

    Args:
        seen: Features of known positives.
        num_classes: C.
        number: Centers per class. A class with fewer distinct features uses the features, repeated as needed.
        moment: Determines the random state, from seed and epoch.

    Returns:
        ``(C, number, d)``, zeros for a class without features.
    """
    from sklearn.cluster import KMeans  # slow to import, and most networks do not need it

    found = seen.features.new_zeros(num_classes, number, seen.features.shape[1])
    seed = moment.generator().initial_seed() % (1 << 32)
    for k in range(num_classes):
        own = seen.features[seen.classes == k]
        if len(np.unique(own.numpy(), axis=0)) > number:
            centers = KMeans(number, n_init=1, random_state=seed).fit(own.numpy()).cluster_centers_
            found[k] = torch.from_numpy(centers)
        elif len(own):
            found[k] = own[torch.arange(number) % len(own)]
    return found


def quadrant_means(seen: Seen, num_classes: int) -> Tensor:
    """Returns the mean feature of each class per quadrant; ``seen.notes`` is the quadrant of each entry (0 to 3).

    Returns:
        ``(C, 4, d)``. A quadrant without entries has the mean over all entries of the class, a class without any zeros.
    """
    notes = torch.zeros_like(seen.classes) if seen.notes is None else seen.notes
    found = seen.features.new_zeros(num_classes, 4, seen.features.shape[1])
    for k in range(num_classes):
        own = seen.classes == k
        for quadrant in range(4):
            here = own & (notes == quadrant)
            if bool(own.any()):
                found[k, quadrant] = seen.features[here if bool(here.any()) else own].mean(0)
    return found
