"""Late fusion of the trained network with stacked probes: final scores that are probabilities.

The network's logits rank images well but are far from probabilities, since ASL pushes them up. The stack's are
calibrated, since they are fitted to scores of labeled images that were left out. Both are brought to the stack's mean
and deviation of each class, measured on the unlabeled images, and averaged. The average is bounded to what so many
labels can support, and then calibrated class by class.
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

if TYPE_CHECKING:  # scikit-learn takes seconds to import, and predictions do without it
    from cbsa_lightning.method.stacking import Array, Stack


@dataclass(frozen=True)
class Fusion:
    """A stack, and the scales on which its logits and a network's are averaged.

    Attributes:
        means: Of the inputs of the k opinions, each ``(D,)``.
        weights: Of the k opinions, each ``(D, C)``.
        offsets: ``(k, C)``.
        slopes: ``(k, C)``, weight of each opinion in the stack's logits.
        offset: ``(C,)``, of the stack's logits.
        limit: ``()``, standard deviations beyond which an opinion gets no stronger.
        stack_mean: ``(C,)``, of the stack's logits over the unlabeled images.
        stack_deviation: ``(C,)``.
        mean: ``(C,)``, of the network's logits over the same images; NaN until :meth:`adapted`.
        deviation: ``(C,)``.
        share: ``()``, of the stack's logits in the average.
        bound: ``()``, what averages stay below: the logit of the rule of succession after as many labels as there are.
            A regression often separates few labels without error, and is then overconfident.
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
        """Takes over a fitted stack.

        Args:
            stack: The stack.
            logits: ``(n, C)``, its logits of the unlabeled images; where there are none, those left out of the labeled.
            labels: ``(m, C)`` in {1, 0, -1}, of the images that the stack was fitted to.
            share: Of the stack's logits in the average, in (0, 1].
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
        """Whether the scale of the network's logits is known."""
        return not bool(self.mean.isnan().any())

    def adapted(self, logits: Tensor) -> Self:
        """The same with the scale of the present network.

        Args:
            logits: ``(n, C)``, the network's, of the unlabeled images.
        """
        return replace(self, mean=logits.float().mean(0), deviation=logits.float().std(0, correction=0))

    def stack_logits(self, description: Description) -> Tensor:
        """Logits ``(B, C)`` of the stack."""
        parts = [*description.descriptors, *description.scores]
        opinions = zip(parts, self.means, self.weights, self.offsets, self.slopes, strict=True)
        said = [
            slope * ((x - mean) @ weight + offset).clamp(-self.limit, self.limit)
            for x, mean, weight, offset, slope in opinions
        ]
        return torch.stack(said).sum(0) + self.offset

    def fused(self, logits: Tensor, stack_logits: Tensor) -> Tensor:
        """Calibrated average of logits ``(B, C)`` of the network and of the stack."""
        return self._calibrated(self.averaged(logits, stack_logits))

    def calibrated(self, stack_logits: Tensor) -> Tensor:
        """Calibrated logits ``(B, C)`` of the stack alone."""
        return self._calibrated(bounded(stack_logits, self.bound))

    def _calibrated(self, logits: Tensor) -> Tensor:
        return self.calibration[0] + self.calibration[1].exp() * logits

    def averaged(self, logits: Tensor, stack_logits: Tensor) -> Tensor:
        """The bounded average on the stack's scale, ``(B, C)``, before the calibration."""
        varies = self.deviation > 1e-6
        own = torch.where(varies, (logits.float() - self.mean) / self.deviation.clamp(min=1e-6), 0.0)
        average = torch.lerp(self.stack_mean + self.stack_deviation * own, stack_logits, self.share)
        result: Tensor = bounded(average, self.bound)
        return result

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        if self.mean.device == torch.device(device):
            return self
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a checkpoint."""
        return {
            name: tensor
            for name, value in vars(self).items()
            for name, tensor in ([(name, value)] if isinstance(value, Tensor) else _numbered(name, value))
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The opposite of :meth:`tensors`."""

        def several(part: str) -> tuple[Tensor, ...]:
            count = sum(name.startswith(f"{part}.") for name in tensors)
            return tuple(tensors[f"{part}.{i}"] for i in range(count))

        single = {name: tensor for name, tensor in tensors.items() if "." not in name}
        return cls(several("means"), several("weights"), **single)


def bounded(logits: Any, bound: float | Tensor) -> Any:
    """Logits in their order, brought between -bound and bound; small ones hardly change."""
    return logits / (1 + (logits / bound) ** 2) ** 0.5


def _numbered(name: str, tensors: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{i}", tensor) for i, tensor in enumerate(tensors)]
