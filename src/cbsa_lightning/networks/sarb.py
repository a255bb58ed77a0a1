"""SARB: semantic-aware representation blending (Pu et al., AAAI 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cbsa_lightning.networks.blending import Blending
from cbsa_lightning.networks.hooks import Batch
from cbsa_lightning.networks.ssgrl import SSGRL


class SARB(SSGRL):
    """SSGRL on a narrower map. Features of unknown labels are blended with features of other images and prototypes.

    Source: repository HCPLab-SYSU/HCP-MLR-PL; see :class:`~cbsa_lightning.networks.blending.Blending`. Differences:
    Images without unknown labels are not changed, whereas the released code overwrites their first label. Prototypes
    are computed from a sample of the known positives.

    Args:
        class_names: The C class names, which determine the word vectors.
        dim: Size of a label feature.
        attention_width: Size of the space that the map and the word vectors are projected to.
        start_epoch: First epoch with blending.
        prototypes: Number of prototypes per class. They are the centers of k-means.
        every: Number of epochs between two computations of the prototypes.
        samples: Maximum number of known positives per class that prototypes are computed from.
        **network: ``backbone``, ``pretrained``, ``words`` and ``steps`` of
            :class:`~cbsa_lightning.networks.ssgrl.SSGRL`.

    Raises:
        ConfigError: If the backbone is not a ResNet, or a setting is out of range.
        WeightsError: If the weights or the word vectors are not available.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        dim: int = 1024,
        attention_width: int = 512,
        start_epoch: int = 5,
        prototypes: int = 10,
        every: int = 5,
        samples: int = 1000,
        **network: Any,
    ) -> None:
        super().__init__(class_names, dim=dim, attention_width=attention_width, **network)
        self.hooks = ClusterBlending(len(class_names), dim, prototypes, start_epoch, every, samples)


class ClusterBlending(Blending):
    """Blending with the centers of k-means."""

    def drawn(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Draws one random center per class, which is the same for all images, as in the released code."""
        which = int(torch.randint(self.prototypes.shape[1], (1,), generator=generator))
        return self.prototypes[:, which].expand_as(batch.features)
