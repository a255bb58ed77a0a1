"""The data set class of the loaders, and functions that collate its items to batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cbsa_lightning.data.batches import EvalBatch, TrainBatch
from cbsa_lightning.data.caches.image_cache import Images
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.errors import DataError

View = PlainView | WeakView | StrongView


class ImageViews:
    """One view of each image of a table. Views are computed on access.

    Args:
        images: The images.
        view: Function that computes the view.
    """

    def __init__(self, images: Images, view: View) -> None:
        self.images, self.view = images, view

    def __call__(self, draw: Draw) -> Tensor:
        """Computes the view of a draw, (3, S, S) uint8."""
        return self.view(self.images[draw.index], draw)


class ReadableViews(ImageViews):
    """A variant of :class:`ImageViews` that returns the error of an unreadable image instead of raising it."""

    def __call__(self, draw: Draw) -> Any:
        """Returns the view of a draw, or a :class:`~cbsa_lightning.errors.DataError`."""
        try:
            return super().__call__(draw)
        except DataError as error:
            return error


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning treats as resumable. The training loop stores and the sampler restores the position."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state. The position is unknown to the loader, which loads batches before they are used."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing; see :meth:`SSMLLDataModule.train_dataloader`."""


class ViewDataset(Dataset[tuple[Any, ...]]):
    """Data set of views and labels of images, indexed by :class:`Draw`.

    Args:
        views: Function that returns the view of a draw, as a uint8 image or as float16 features.
        targets: ``(n, C)`` int8, the labels, which are returned with the views.
        labeled: ``(n,)`` bool, which is also returned, or None. The targets of unlabeled rows are replaced by -1, so
            that they are hidden from training.
    """

    def __init__(self, views: Callable[[Draw], Tensor], targets: np.ndarray, labeled: np.ndarray | None = None) -> None:
        self.views, self.targets, self.labeled = views, targets, labeled

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        view, target = self.views(draw), torch.from_numpy(self.targets[draw.index])
        if self.labeled is None:
            return view, target, draw.index
        labeled = bool(self.labeled[draw.index])
        return view, target if labeled else torch.full_like(target, -1), draw.index, labeled


def collate(items: list[tuple[Any, ...]]) -> TrainBatch | EvalBatch:
    """Collates items of :class:`ViewDataset` to a batch. It is a training batch if the items have ``labeled``."""
    views, targets, index, *labeled = zip(*items, strict=True)
    images, features = _stacked(views)
    if labeled:
        return TrainBatch(images, torch.stack(targets), torch.tensor(index), torch.tensor(labeled[0]), features)
    return EvalBatch(images, torch.stack(targets), torch.tensor(index), features)


def collate_readable(items: list[tuple[Any, ...]], size: int) -> EvalBatch:
    """Collates items of :class:`ReadableViews`, whose images have a side of ``size``."""
    black = torch.zeros(3, size, size, dtype=torch.uint8)
    unread = tuple((index, str(view)) for view, _, index in items if isinstance(view, DataError))
    readable = [(black if isinstance(view, DataError) else view, target, index) for view, target, index in items]
    return cast(EvalBatch, collate(readable))._replace(unread=unread)


def _stacked(views: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Stacks views and returns (images, None) if they are uint8, or (None, features) if they are float16."""
    # In contrast to torch.stack, default_collate writes directly to shared memory in a worker.
    stacked: Tensor = default_collate(list(views))
    return (stacked, None) if stacked.dtype == torch.uint8 else (None, stacked)
