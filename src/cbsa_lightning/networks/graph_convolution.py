"""The weight layer of a graph convolution, used by GCN-ML and SCPNet."""

from __future__ import annotations

from torch import nn


def graph_convolution(before: int, after: int) -> nn.Linear:
    """Returns a linear layer without bias that is initialized uniformly, as in the original code.

    Args:
        before: Input width.
        after: Output width.
    """
    layer = nn.Linear(before, after, bias=False)
    nn.init.uniform_(layer.weight, -(after**-0.5), after**-0.5)
    return layer
