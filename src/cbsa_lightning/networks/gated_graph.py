"""A gated graph network over the classes, and the co-occurrence graph of known labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.hooks import TrainingHooks


def conditional_cooccurrence(labels: Tensor) -> Tensor:
    """Returns the fraction of the images with class i that also have class j. Only known positives are counted.

    Args:
        labels: ``(m, C)`` in {1, 0, -1 unknown}.

    Returns:
        ``(C, C)`` float32 with a diagonal of 1. Rows and columns of classes without known positives are zero.
    """
    positive = (labels == 1).double()
    together = positive.T @ positive
    return (together / together.diagonal()[:, None].clamp(min=1)).float()


class LabelGraph(TrainingHooks):
    """Computes ``network.graph`` from the training labels; see :func:`conditional_cooccurrence`."""

    def before_training(self, network: nn.Module, labels: Tensor) -> None:
        """See :class:`TrainingHooks`."""
        network.get_buffer("graph").copy_(conditional_cooccurrence(labels))


class GatedGraph(nn.Module):
    """Gated recurrent network that updates the features of the classes with messages in both directions of the graph.

    Source: see :mod:`~cbsa_lightning.networks.decoupling`. The gates are those of "Gated Graph Sequence Neural
    Networks" (Li et al., ICLR 2016). The weights of the three gates are stored in one tensor, with a single bias. The
    released code has two biases that are added.

    Args:
        dim: Size of a feature.
        steps: Number of updates.
    """

    def __init__(self, dim: int, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.message = nn.Linear(2 * dim, 3 * dim)
        self.gates = nn.Linear(dim, 2 * dim, bias=False)
        self.candidate = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor, graph: Tensor) -> Tensor:
        """Returns the features ``(B, C, dim)`` after all updates along ``graph (C, C)``."""
        x, graph = features, graph.to(features.dtype)
        for _ in range(self.steps):
            sent = self.message(torch.cat([graph @ x, graph.T @ x], -1))
            to_gates, to_candidate = sent.split([2 * x.shape[-1], x.shape[-1]], -1)
            update, reset = (to_gates + self.gates(x)).sigmoid().chunk(2, -1)
            new = (to_candidate + self.candidate(reset * x)).tanh()
            x = (1 - update) * x + update * new
        return x
