"""The weights of a graph convolution, shared by GCN-ML and SCPNet."""

from __future__ import annotations

from torch import nn


def graph_convolution(before: int, after: int) -> nn.Linear:
    """Returns a layer without bias, initialized uniformly as in the originals.

    Args:
        before: Input width.
        after: Output width.
    """
    layer = nn.Linear(before, after, bias=False)
    nn.init.uniform_(layer.weight, -(after**-0.5), after**-0.5)
    return layer
