"""Dropout with cheap random masks on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drop(x: Tensor, rate: float) -> Tensor:
    """Sets random entries to zero and scales the others, like ``F.dropout(x, rate)``.

    On a CPU, torch draws a Bernoulli variable for each entry. This function draws 16 random bits instead, which takes a
    third of the time, so ``rate`` is rounded to a multiple of 1 / 65536.
    """
    dropped = round(rate * 65536)
    if x.device.type != "cpu" or not 0 < dropped < 65536:
        return F.dropout(x, rate)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return x * (keep.to(x.dtype) / (1 - dropped / 65536))


class Dropout(nn.Dropout):
    """Layer that applies :func:`drop` in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies dropout in training, and returns ``x`` in evaluation."""
        return drop(x, self.p) if self.training and self.p else x
