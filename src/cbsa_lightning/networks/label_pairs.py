"""Prediction of the labels that co-occur in an image from its label features.

Source: see :mod:`~cbsa_lightning.networks.contrast`. For each pair of labels i < j with features f, the released code
passes the concatenated projections ``[P f_i, P f_j]`` through two layers and a classifier that is specific to the
pair. The implementation below differs as follows:

- The first layer is applied to each label instead of each pair, as ``A P f_i + B P f_j``.
- The second layer and the classifier, which are both linear, are combined into one vector per pair. A dot product
  thus replaces a matrix product for each image and pair.
- The pairs of only one image are stored at a time, and they are recomputed in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LabelPairs(nn.Module):
    """Computes a logit for each pair of labels, which predicts whether an image has both labels.

    Args:
        num_classes: C.
        dim: Size of a label feature.
        width: Size of the projection of a label feature.
    """

    first: Tensor
    second: Tensor

    def __init__(self, num_classes: int, dim: int, width: int) -> None:
        super().__init__()
        pairs = torch.triu_indices(num_classes, num_classes, 1)
        self.register_buffer("first", pairs[0], persistent=False)
        self.register_buffer("second", pairs[1], persistent=False)
        self.project = nn.Linear(dim, width)
        self.join = nn.Linear(2 * width, dim)
        self.mix = nn.Linear(dim, dim)
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(pairs.shape[1], dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(pairs.shape[1]).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """Returns pair logits ``(B, C (C - 1) / 2)`` of label features ``(B, C, dim)``, in the order of ``first``."""
        x = self.project(features)
        left, right = self.join.weight.chunk(2, 1)
        a, b = F.linear(x, left, self.join.bias), F.linear(x, right)
        vectors = self.weight @ self.mix.weight
        offset = self.weight @ self.mix.bias + self.bias
        logits = [
            checkpoint(self._of_image, one, other, vectors, use_reentrant=False, preserve_rng_state=False)
            for one, other in zip(a, b, strict=True)
        ]
        return torch.stack(logits) + offset

    def _of_image(self, a: Tensor, b: Tensor, vectors: Tensor) -> Tensor:
        return ((a[self.first] + b[self.second]).relu() * vectors).sum(-1)

    def targets(self, targets: Tensor) -> Tensor:
        """Returns ``(B, pairs)`` int8: 1 if both labels are known positives, else 0."""
        have = targets == 1
        return (have[:, self.first] & have[:, self.second]).to(torch.int8)

    def given_known(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean probability ``(B, C)`` that a label co-occurs with the known positives of its image.

        It is 0 if there are no known positives. A label co-occurs with itself with probability 1.

        Args:
            logits: ``(B, pairs)``.
            targets: ``(B, C)`` in {1, 0, -1 unknown}.
        """
        number = targets.shape[1]
        together = torch.eye(number, device=logits.device, dtype=logits.dtype).repeat(len(logits), 1, 1)
        probabilities = logits.sigmoid()
        together[:, self.first, self.second] = probabilities
        together[:, self.second, self.first] = probabilities
        have = (targets == 1).to(logits.dtype)
        return (together @ have[..., None])[..., 0] / have.sum(1, keepdim=True).clamp(min=1)


def pair_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the element-wise asymmetric loss of pairs.

    The loss is ``-(1 - p) log p`` if both labels are present, and ``-q^2 log(1 - q)`` with ``q = max(p - 0.05, 0)``
    otherwise. As in the released code, gradients are also computed through the focal factors.

    Args:
        logits: ``(B, pairs)``. The loss is computed in float32.
        targets: ``(B, pairs)`` in {1, 0}.
    """
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.float()
        kept = (torch.sigmoid(-x) + 0.05).clamp(max=1.0)
        return torch.where(targets == 1, -torch.sigmoid(-x) * F.logsigmoid(x), -((1 - kept) ** 2) * kept.log())
