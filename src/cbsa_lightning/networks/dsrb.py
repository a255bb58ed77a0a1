"""DSRB: dual-perspective semantic-aware representation blending (Pu et al., Expert Systems with Applications 2024).

It blends maps of label features where SARB blends their sums, and takes the prototype from another quadrant of the
image than the label's own. A map ``(h, w, C, D)`` is the attention times the features of the places. After blending,
the released code sums it over the places. Blending is linear, so here the sums are blended: the label features of
:class:`~cbsa_lightning.networks.ssgrl.SSGRL`, and as prototypes their means over the images that have the label in a
quadrant. The result is the same, and no map is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cbsa_lightning.networks.blending import Blending
from cbsa_lightning.networks.hooks import Batch, Moment, Seen
from cbsa_lightning.networks.prototypes import quadrant_means
from cbsa_lightning.networks.ssgrl import SSGRL


class DSRB(SSGRL):
    """SSGRL on a narrower map, with features of other images and of other places blended in where labels are unknown.

    Source: repository HCPLab-SYSU/HCP-MLR-PL, whose code for it does not run; see
    :class:`~cbsa_lightning.networks.blending.Blending`. Differences: an image without unknown labels is not changed
    (the released code overwrites its first label), and prototypes are means of a random sample.

    Args:
        class_names: The C class names, for word vectors.
        dim: Size of a label feature.
        attention_width: Size of the space that map and word vectors are projected to.
        start_epoch: First epoch with blending.
        every: Epochs between two computations of the prototypes.
        samples: Maximum number of known positives per class for its prototypes; 400 is about 100 per quadrant.
        **network: ``backbone``, ``pretrained``, ``words`` and ``steps`` of
            :class:`~cbsa_lightning.networks.ssgrl.SSGRL`.

    Raises:
        ConfigError: The backbone is not a ResNet, or a setting is outside of its bounds.
        WeightsError: Weights or word vectors are not available.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        dim: int = 1024,
        attention_width: int = 512,
        start_epoch: int = 5,
        every: int = 5,
        samples: int = 400,
        **network: Any,
    ) -> None:
        super().__init__(class_names, dim=dim, attention_width=attention_width, **network)
        self.hooks = QuadrantBlending(len(class_names), dim, start_epoch, every, samples)

    def notes(self, found: Tensor, weights: Tensor) -> Tensor:
        """Returns the quadrant ``(B, C)``, 0 to 3 row by row, of the highest channel sum in the map of each label."""
        rows, columns = found.shape[2:]
        peak = (weights * found.sum(1).flatten(1)[:, None]).argmax(-1)
        return 2 * (peak // columns >= rows // 2) + (peak % columns >= columns // 2)


class QuadrantBlending(Blending):
    """Blending with the mean feature of a class in another quadrant.

    Args:
        num_classes: See :class:`Blending`.
        dim: See :class:`Blending`.
        start_epoch: See :class:`Blending`.
        every: See :class:`Blending`.
        samples: See :class:`Blending`.
    """

    def __init__(self, num_classes: int, dim: int, start_epoch: int, every: int, samples: int) -> None:
        super().__init__(num_classes, dim, 4, start_epoch, every, samples)

    def before_epoch(self, seen: Seen, moment: Moment) -> None:
        """Computes the means."""
        self.prototypes.copy_(quadrant_means(seen, len(self.prototypes)))

    def drawn(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns, for each image and label, the mean of a random quadrant other than the label's own."""
        own = cast(Tensor, batch.output.notes)
        turn = torch.randint(1, 4, (len(batch.whole), own.shape[1]), generator=generator).to(own.device)
        other = (own - turn[batch.whole.places]) % 4
        return self.prototypes[torch.arange(own.shape[1], device=own.device), other]
