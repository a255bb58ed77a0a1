"""Custom parts for tests/test_own_parts.py, which a configuration refers to by class path."""

from __future__ import annotations

import albumentations as A
import torch
from torch import Tensor, nn

from cbsa_lightning.data.augmentations import Augmentation
from cbsa_lightning.method.context_task import Partition
from cbsa_lightning.method.ema import ParameterEMA


class Inverted(Augmentation):
    """Inverts every image."""

    name = "inverted"

    def transforms(self) -> list[A.BasicTransform]:
        return [A.InvertImg(p=1)]


class LastWeights(ParameterEMA):
    """Keeps the weights of the last step instead of an average."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, 0.0)


class OddAndEven(Partition):
    """Puts every other class into the same context."""

    def __call__(self, S: Tensor, num_contexts: int) -> Tensor:
        return torch.arange(len(S)) % num_contexts


class MeanToken(nn.Module):
    """Gives every class the mean token plus a learned offset."""

    def __init__(self, width: int, start: float = 0.0) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.full((width,), start).float())

    def forward(
        self, queries: Tensor, local: Tensor, places: Tensor, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return (local.mean(1, keepdim=True) + self.offset).expand(-1, len(queries), -1), None
