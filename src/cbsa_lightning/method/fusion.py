"""Late fusion of the trained network with stacked probes, which yields calibrated probabilities as final scores.

The network ranks images well, but its scores are not calibrated, since ASL shifts its logits up. The stack's logits are
calibrated, since the stack is fitted to out-of-fold scores of the labeled images. For each class, the network's logits
are rescaled to the mean and the standard deviation of the stack's logits on the unlabeled images, and both are then
averaged. The average is bounded according to the number of labels, and is finally calibrated for each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbsa_lightning.method.calibration import fit_calibration
from cbsa_lightning.networks.base import Description

if TYPE_CHECKING:  # scikit-learn takes seconds to import, and predictions do not need it
    from cbsa_lightning.method.stacking import Array, Stack


@dataclass(frozen=True)
class Fusion:
    """A stack and the statistics for averaging its logits with those of a network.

    Attributes:
        means: Means of the inputs of the k opinions, each ``(D,)``.
        weights: Weights of the k opinions, each ``(D, C)``.
        offsets: ``(k, C)``, offsets of the k opinions.
        slopes: ``(k, C)``, weight of each opinion in the stack's logits.
        offset: ``(C,)``, offset of the stack's logits.
        limit: ``()``, number of standard deviations at which an opinion is clipped.
        stack_mean: ``(C,)``, mean of the stack's logits over the unlabeled images.
        stack_deviation: ``(C,)``, standard deviation of the same logits.
        mean: ``(C,)``, mean of the network's logits over the same images; NaN before :meth:`adapted`.
        deviation: ``(C,)``, standard deviation of the same logits.
        share: ``()``, weight of the stack's logits in the average.
        bound: ``()``, bound on the absolute value of the average: the logit of the rule of succession for the number
            of labels. It is needed because a regression often separates a few labels without error, and is then
            overconfident.
        calibration: ``(6, C)``, see :meth:`~cbsa_lightning.method.calibration.Calibration.packed`.
    """

    means: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    offsets: Tensor
    slopes: Tensor
    offset: Tensor
    limit: Tensor
    stack_mean: Tensor
    stack_deviation: Tensor
    mean: Tensor
    deviation: Tensor
    share: Tensor
    bound: Tensor
    calibration: Tensor

    @classmethod
    def of(cls, stack: Stack, logits: Array, labels: NDArray[np.int8], share: float) -> Self:
        """Builds the fusion from a fitted stack.

        Args:
            stack: The stack.
            logits: ``(n, C)``, the stack's logits of the unlabeled images, or its out-of-fold logits of the labeled
                images if there are no unlabeled ones.
            labels: ``(m, C)`` in {1, 0, -1}, labels of the images that the stack was fitted to.
            share: Weight of the stack's logits in the average, in (0, 1].
        """

        def tensor(array: Array) -> Tensor:
            return torch.from_numpy(array).float()

        bound = float(np.log((labels >= 0).sum() + 2))
        unset = torch.full((logits.shape[1],), torch.nan).float()
        return cls(
            tuple(tensor(opinion.mean) for opinion in stack.opinions),
            tuple(tensor(opinion.weight) for opinion in stack.opinions),
            torch.stack([tensor(opinion.offset) for opinion in stack.opinions]),
            tensor(stack.slopes),
            tensor(stack.offset),
            torch.tensor(stack.limit).float(),
            tensor(logits.mean(0)),
            tensor(logits.std(0)),
            unset,
            unset,
            torch.tensor(share).float(),
            torch.tensor(bound).float(),
            tensor(fit_calibration(bounded(stack.left_out(), bound), labels).packed()),
        )

    @property
    def ready(self) -> bool:
        """Whether the mean and the standard deviation of the network's logits are known."""
        return not bool(self.mean.isnan().any())

    def adapted(self, logits: Tensor) -> Self:
        """Returns a copy with the mean and the standard deviation of the current network's logits.

        Args:
            logits: ``(n, C)``, the network's logits of the unlabeled images.
        """
        return replace(self, mean=logits.float().mean(0), deviation=logits.float().std(0, correction=0))

    def stack_logits(self, description: Description) -> Tensor:
        """Returns the stack's logits ``(B, C)``."""
        parts = [*description.descriptors, *description.scores]
        opinions = zip(parts, self.means, self.weights, self.offsets, self.slopes, strict=True)
        said = [
            slope * ((x - mean) @ weight + offset).clamp(-self.limit, self.limit)
            for x, mean, weight, offset, slope in opinions
        ]
        return torch.stack(said).sum(0) + self.offset

    def fused(self, logits: Tensor, stack_logits: Tensor) -> Tensor:
        """Returns the calibrated average ``(B, C)`` of the network's and the stack's logits."""
        return self._calibrated(self.averaged(logits, stack_logits))

    def calibrated(self, stack_logits: Tensor) -> Tensor:
        """Returns the stack's calibrated logits ``(B, C)``, without the network."""
        return self._calibrated(bounded(stack_logits, self.bound))

    def _calibrated(self, logits: Tensor) -> Tensor:
        return self.calibration[0] + self.calibration[1].exp() * logits

    def averaged(self, logits: Tensor, stack_logits: Tensor) -> Tensor:
        """Returns the bounded average ``(B, C)`` on the stack's scale, before calibration."""
        varies = self.deviation > 1e-6
        own = torch.where(varies, (logits.float() - self.mean) / self.deviation.clamp(min=1e-6), 0.0)
        average = torch.lerp(self.stack_mean + self.stack_deviation * own, stack_logits, self.share)
        result: Tensor = bounded(average, self.bound)
        return result

    def to(self, device: torch.device | str) -> Self:
        """Returns a copy on the given device."""
        if self.mean.device == torch.device(device):
            return self
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name, for a checkpoint."""
        return {
            name: tensor
            for name, value in vars(self).items()
            for name, tensor in ([(name, value)] if isinstance(value, Tensor) else _numbered(name, value))
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Inverts :meth:`tensors`."""

        def several(part: str) -> tuple[Tensor, ...]:
            count = sum(name.startswith(f"{part}.") for name in tensors)
            return tuple(tensors[f"{part}.{i}"] for i in range(count))

        single = {name: tensor for name, tensor in tensors.items() if "." not in name}
        return cls(several("means"), several("weights"), **single)


def bounded(logits: Any, bound: float | Tensor) -> Any:
    """Maps logits monotonically to (-bound, bound); logits close to 0 hardly change."""
    return logits / (1 + (logits / bound) ** 2) ** 0.5


def _numbered(name: str, tensors: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{i}", tensor) for i, tensor in enumerate(tensors)]
