"""Prototypes of labels, which are features that represent the known positives of a label.

Source: "Semantic-Aware Representation Blending for Multi-Label Image Recognition with Partial Labels" (SARB; Pu et al.,
AAAI 2022), repository HCPLab-SYSU/HCP-MLR-PL.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cbsa_lightning.arguments import check_number
from cbsa_lightning.networks.gated_graph import LabelGraph
from cbsa_lightning.networks.hooks import Moment, Seen


class Prototypes(LabelGraph):
    """Computes prototypes from known positives every few epochs. By default, they are the centers of k-means.

    Args:
        num_classes: C.
        dim: Size of a label feature.
        number: Number of prototypes per class.
        start_epoch: First epoch that uses prototypes.
        every: Number of epochs between two computations of the prototypes.
        samples: Maximum number of known positives per class that prototypes are computed from.

    Raises:
        ConfigError: If a setting is out of range.
    """

    prototypes: Tensor

    def __init__(self, num_classes: int, dim: int, number: int, start_epoch: int, every: int, samples: int) -> None:
        super().__init__()
        for name, value, least in (("start_epoch", start_epoch, 0), ("every", every, 1), ("samples", samples, 1)):
            check_number(name, value, least, whole=True)
        check_number("prototypes", number, 1, whole=True)
        self.start_epoch, self.every, self.samples = start_epoch, every, samples
        self.register_buffer("prototypes", torch.zeros(num_classes, number, dim))

    def idle(self, moment: Moment) -> bool:
        """Returns whether the epoch precedes the first epoch with prototypes."""
        return moment.epoch < self.start_epoch

    def wanted(self, labels: Tensor, moment: Moment) -> Tensor | None:
        """Selects known positives in epochs that compute prototypes."""
        if not due(moment, self.start_epoch, self.every):
            return None
        return sampled_positives(labels, self.samples, moment)

    def before_epoch(self, seen: Seen, moment: Moment) -> None:
        """Computes the prototypes."""
        num_classes, number, _ = self.prototypes.shape
        self.prototypes.copy_(clustered(seen, num_classes, number, moment))


def due(moment: Moment, start_epoch: int, every: int) -> bool:
    """Returns whether to compute prototypes in this epoch: in ``start_epoch``, and then every few epochs."""
    return moment.epoch >= start_epoch and (moment.epoch - start_epoch) % every == 0


def sampled_positives(labels: Tensor, most: int, moment: Moment) -> Tensor:
    """Selects known positives of labels ``(m, C)``, at most ``most`` random ones per class; ``(m, C)`` bool."""
    have = labels == 1
    order = torch.rand(labels.shape, generator=moment.generator()).masked_fill_(~have, 2.0).argsort(0).argsort(0)
    return have & (order < most)


def clustered(seen: Seen, num_classes: int, number: int, moment: Moment) -> Tensor:
    """Returns the centers of k-means over the features of each class.

    Args:
        seen: Features of known positives.
        num_classes: C.
        number: Number of centers per class. If a class has fewer distinct features, they are repeated.
        moment: Its seed and epoch determine the random state.

    Returns:
        ``(C, number, d)``. The centers of a class without features are zero.
    """
    from sklearn.cluster import KMeans  # imported here because it is slow to import and most networks do not need it

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
    """Returns the mean feature of each class in each quadrant. ``seen.notes`` contains the quadrants (0 to 3).

    Returns:
        ``(C, 4, d)``. The value of a quadrant without entries is the mean over all entries of the class, or zero if the
        class has none.
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
