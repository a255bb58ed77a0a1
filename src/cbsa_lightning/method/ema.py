"""Exponential moving average of the trainable weights (CAP keeps one for pseudo-labels)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.compiled import plain_name


class ParameterEMA(nn.Module):
    """Average of the trainable parameters of a module, and of the running statistics that go with them.

    CAP averages the whole state. Frozen weights and all other buffers are left out here: with a frozen CLIP
    they are most of the memory and never change. A trained BatchNorm also updates its running means and
    variances, and those of the raw weights do not match averaged weights, so they are averaged too. The averages are
    buffers: they are saved in checkpoints and moved to devices with their owner.

    Args:
        module: Whose weights are averaged, if any are trainable; which ones are must not change afterwards.
        decay: Share of the old average that each :meth:`update` keeps.

    Attributes:
        names: What is averaged, by its names in ``module``.
    """

    started: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.exchanged = False  # whether ``module`` holds the averages now
        moving = _moving_statistics(module)
        self._moving = list(moving)
        averaged = {plain_name(name): p for name, p in module.named_parameters() if p.requires_grad} | moving
        self.names = list(averaged)
        for name, value in averaged.items():
            self.register_buffer(self.key(name), value.detach().clone())
        self.register_buffer("started", torch.tensor(False))

    @staticmethod
    def key(name: str) -> str:
        """Name of the buffer that holds the average of what is called ``name`` in the module."""
        return "average_of_" + name.replace(".", "__")  # a buffer's name cannot hold a dot

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        named = [*module.named_parameters(), *module.named_buffers()]
        state: dict[str, Tensor] = {plain_name(name): value for name, value in named}
        averages = [self.get_buffer(self.key(name)) for name in self.names]
        return averages, [state[name] for name in self.names]

    def statistics(self, module: nn.Module) -> list[Tensor]:
        """The running statistics among what is averaged, of ``module`` itself."""
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
        """One step: ``average <- decay * average + (1 - decay) * weight``."""
        averages, current = self._pairs(module)
        if averages:
            torch._foreach_lerp_(averages, [p.detach() for p in current], 1.0 - self.decay)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Swaps the averages into ``module`` for the duration of the context, without copying memory.

        Before :meth:`start` the module keeps its own weights, since there is no average yet.
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
        torch.clear_autocast_cache()  # it is keyed by tensor identity, which the swap does not change


def _moving_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances, by name, of the normalization layers that are trained; not their counters."""
    return {
        plain_name(name): value
        for prefix, layer in module.named_modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
        for name, value in layer.named_buffers(prefix, recurse=False)
        if name.rpartition(".")[2].startswith("running_") and value.is_floating_point()
    }
