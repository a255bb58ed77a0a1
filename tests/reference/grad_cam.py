"""Slow, plain Grad-CAM without automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def grad_cam(logit: Callable[[Tensor], Tensor], image: Tensor, step: float = 1e-4) -> Tensor:
    """Computes the map of one class of one image.

    The weight of a channel is the mean derivative of the logit over the places. Its sum over the places is the
    derivative with respect to a constant that is added to the whole channel, computed with central differences.

    Args:
        logit: Maps ``(D, h, w)`` to a scalar.
        image: ``(D, h, w)``, float64.
        step: Step of the differences.

    Returns:
        ``(h, w)``.
    """
    places = image.shape[1] * image.shape[2]
    heat = torch.zeros_like(image[0])
    for channel in range(len(image)):
        up, down = image.clone(), image.clone()
        up[channel] += step
        down[channel] -= step
        weight = (logit(up) - logit(down)) / (2 * step) / places
        heat += weight * image[channel]
    return heat.clamp(min=0)
