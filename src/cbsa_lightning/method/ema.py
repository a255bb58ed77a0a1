"""Exponential moving average of the trainable weights (CAP uses one for pseudo-labels)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.compiled import plain_name


class ParameterEMA(nn.Module):
    """Averages the trainable parameters of a module and the running statistics of trained normalization layers.

    CAP averages the whole state. This class skips frozen weights and all other buffers, since a frozen CLIP makes up
    most of the memory and never changes. The running means and variances of a trained BatchNorm are averaged as well,
    because those that belong to the raw weights do not match averaged weights. The averages are buffers, so they are
    saved in checkpoints and move to devices with the parent module.

    Args:
        module: Module to average. The set of its trainable parameters must not change afterwards.
        decay: Weight of the old average in each :meth:`update`.

    Attributes:
        names: Names of the averaged tensors in ``module``.
    """

    started: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.exchanged = False  # whether the averages are currently swapped into ``module``
        moving = _moving_statistics(module)
        self._moving = list(moving)
        averaged = {plain_name(name): p for name, p in module.named_parameters() if p.requires_grad} | moving
        self.names = list(averaged)
        for name, value in averaged.items():
            self.register_buffer(self.key(name), value.detach().clone())
        self.register_buffer("started", torch.tensor(False))

    @staticmethod
    def key(name: str) -> str:
        """Returns the name of the buffer for the average of the tensor ``name``."""
        return "average_of_" + name.replace(".", "__")  # a buffer's name must not contain a dot

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        named = [*module.named_parameters(), *module.named_buffers()]
        state: dict[str, Tensor] = {plain_name(name): value for name, value in named}
        averages = [self.get_buffer(self.key(name)) for name in self.names]
        return averages, [state[name] for name in self.names]

    def statistics(self, module: nn.Module) -> list[Tensor]:
        """Returns the running statistics of ``module`` that are averaged."""
        state = {plain_name(name): value for name, value in module.named_buffers()} if self._moving else {}
        return [state[name] for name in self._moving]

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Resets the averages to the current weights of ``module``."""
        averages, current = self._pairs(module)
        if averages:
            torch._foreach_copy_(averages, [p.detach() for p in current])
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Performs one step: ``average <- decay * average + (1 - decay) * weight``."""
        averages, current = self._pairs(module)
        if averages:
            torch._foreach_lerp_(averages, [p.detach() for p in current], 1.0 - self.decay)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Swaps the averages into ``module`` for the duration of the context, without copying memory.

        Before :meth:`start`, the module keeps its own weights, since there is no average yet.
        """
        if not bool(self.started):
            yield
            return
        averages, current = self._pairs(module)
        try:
            self._exchange(averages, current)
            self.exchanged = True
            yield
        finally:
            self._exchange(averages, current)
            self.exchanged = False

    @staticmethod
    def _exchange(averages: list[Tensor], current: list[Tensor]) -> None:
        for average, weight in zip(averages, current, strict=True):
            average.data, weight.data = weight.data, average.data
        torch.clear_autocast_cache()  # its keys are tensor identities, which the swap does not change


def _moving_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Returns the running means and variances of the trained normalization layers by name, without their counters."""
    return {
        plain_name(name): value
        for prefix, layer in module.named_modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
        for name, value in layer.named_buffers(prefix, recurse=False)
        if name.rpartition(".")[2].startswith("running_") and value.is_floating_point()
    }
