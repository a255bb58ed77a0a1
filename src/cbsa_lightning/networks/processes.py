"""Sums and batches over all training processes. With one process, each function returns its input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def number() -> int:
    """Returns the number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """Returns the sum of a tensor over the processes, without gradients."""
    x = x.detach().clone()
    if number() > 1:
        dist.all_reduce(x)
    return x


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Returns the mean of the selected entries of all processes.

    Args:
        values: The values of this process, of any shape.
        chosen: Mask of the selected entries, bool, of the same shape.

    Returns:
        A scalar whose mean over the processes is the mean over all selected entries, or 0 if there are none. DDP
        averages gradients, so the resulting gradient is that of the mean over all selected entries.
    """
    count = total(chosen.sum()).clamp(min=1)
    return torch.where(chosen, values, torch.zeros_like(values)).sum() * number() / count


class WholeBatch:
    """Joins the rows of a batch from all processes, in the order of a run with one process.

    Each of n processes has every n-th labeled and every n-th unlabeled image (:mod:`cbsa_lightning.data.samplers`).

    Args:
        labeled: ``(B,)`` bool, whether an image is labeled. Labeled images must come first.

    Attributes:
        places: ``(B,)`` int64, rows of this process's images in the joined batch.
    """

    def __init__(self, labeled: Tensor) -> None:
        own = len(labeled)
        self._sizes = [own]
        self._order: Tensor | None = None
        self.places = torch.arange(own, device=labeled.device)
        if number() == 1:
            return
        sizes = [torch.zeros(2, dtype=torch.int64, device=labeled.device) for _ in range(number())]
        dist.all_gather(sizes, torch.stack([labeled.sum(), (~labeled).sum()]))
        parts = [size.tolist() for size in sizes]
        self._sizes = [sum(part) for part in parts]
        turns = [[(0, i) for i in range(a)] + [(1, i) for i in range(b)] for a, b in parts]
        keys = [(unlabeled, i, rank) for rank, turn in enumerate(turns) for unlabeled, i in turn]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._order = torch.tensor(order, device=labeled.device)
        first = sum(self._sizes[: dist.get_rank()])
        self.places = self._order.argsort()[first : first + own]

    def __len__(self) -> int:
        """Returns the number of images in the joined batch."""
        return sum(self._sizes)

    def join(self, x: Tensor) -> Tensor:
        """Returns the rows ``(n, ...)`` of all processes, given the rows ``(B, ...)`` of this one.

        Gradients are propagated to all processes.

        A loss that every process computes from the joined rows has the same gradient as with one process: the backward
        pass sums the gradients of all processes, and DDP divides the sum by the number of processes.
        """
        if self._order is None:
            return x
        longest = max(self._sizes)
        filled = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        if x.requires_grad:
            parts = list(all_gather(filled))  # type: ignore[no-untyped-call]
        else:
            parts = [torch.empty_like(filled) for _ in self._sizes]
            dist.all_gather(parts, filled.contiguous())
        return torch.cat([part[:size] for part, size in zip(parts, self._sizes, strict=True)])[self._order]
