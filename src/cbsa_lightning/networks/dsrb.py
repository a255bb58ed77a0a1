"""DSRB: dual-perspective semantic-aware representation blending (Pu et al., Expert Systems with Applications 2024).

DSRB blends maps of label features, whereas SARB blends their sums. It takes the prototype of a label from a quadrant of
the image in which the label is not. A map ``(h, w, C, D)`` is the product of the attention and the features of the
places. After blending, the released code sums the map over the places. Blending is linear, so this implementation
blends the sums and obtains the same result without storing maps. The sums are the label features of
:class:`~cbsa_lightning.networks.ssgrl.SSGRL`. The prototypes are their means over the images that have the label in a
given quadrant.
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
    """SSGRL on a narrower map. Features of unknown labels are blended with features of other images and places.

    Source: repository HCPLab-SYSU/HCP-MLR-PL, whose code for DSRB cannot be run; see
    :class:`~cbsa_lightning.networks.blending.Blending`. Differences: Images without unknown labels are not changed,
    whereas the released code overwrites their first label. Prototypes are means over a random sample.

    Args:
        class_names: The C class names, which determine the word vectors.
        dim: Size of a label feature.
        attention_width: Size of the space that the map and the word vectors are projected to.
        start_epoch: First epoch with blending.
        every: Number of epochs between two computations of the prototypes.
        samples: Maximum number of known positives per class that prototypes are computed from. With 400, each quadrant
            has about 100.
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
        every: int = 5,
        samples: int = 400,
        **network: Any,
    ) -> None:
        super().__init__(class_names, dim=dim, attention_width=attention_width, **network)
        self.hooks = QuadrantBlending(len(class_names), dim, start_epoch, every, samples)

    def notes(self, found: Tensor, weights: Tensor) -> Tensor:
        """Returns the quadrant ``(B, C)`` (0 to 3, row by row) in which the map of each label has its highest sum."""
        rows, columns = found.shape[2:]
        peak = (weights * found.sum(1).flatten(1)[:, None]).argmax(-1)
        return 2 * (peak // columns >= rows // 2) + (peak % columns >= columns // 2)


class QuadrantBlending(Blending):
    """Blending with the mean feature of the class in another quadrant.

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
        """Computes the means of all quadrants."""
        self.prototypes.copy_(quadrant_means(seen, len(self.prototypes)))

    def drawn(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns, for each image and label, the mean of a random quadrant other than the label's own."""
        own = cast(Tensor, batch.output.notes)
        turn = torch.randint(1, 4, (len(batch.whole), own.shape[1]), generator=generator).to(own.device)
        other = (own - turn[batch.whole.places]) % 4
        return self.prototypes[torch.arange(own.shape[1], device=own.device), other]
