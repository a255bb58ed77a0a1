"""Weak and strong views of an image.

In every worker of a loader, albumentations uses the same random stream (observed with version 2.0.8). Here, each call
has a separate stream, which is determined by (seed, epoch, visit, index, view). Views therefore do not depend on the
number of workers or ranks, or on restarts.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from cbsa_lightning.data.augmentations import Augmentation, CutoutRandAugment, Flip
from cbsa_lightning.data.plain_view import PlainView, checked_size, squash, to_tensor
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.errors import ConfigError

__all__ = ["PlainView", "StrongView", "WeakView", "squash"]

_WEAK, _STRONG = 0, 1  # identify independent random streams of the same seed
# An image that is used to detect whether a pipeline mirrors images.
_LEFT_TO_RIGHT = np.repeat(np.array([[[0], [1]]], np.uint8), 3, axis=2)


class _RandomView:
    """View that resizes the image and then applies transforms, which are reseeded for every call. Not thread-safe.

    Images are resized first, so that a cached resized image results in the same view as its file.
    """

    def __init__(self, size: int, seed: int, stream: int, augmentation: Augmentation) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}, but must be an integer of at least 0")
        self.size, self.seed, self._stream = checked_size(size), seed, stream
        self.augmentation = augmentation
        self._pipeline = augmentation.pipeline()

    def __call__(self, image: np.ndarray, draw: Draw) -> torch.Tensor:
        """Computes the view for a draw.

        Args:
            image: (H, W, 3) uint8, RGB. It is not modified.
            draw: Index of the image, epoch, and number of its previous occurrences in the epoch.

        Returns:
            (3, S, S) uint8, contiguous.

        Raises:
            DataError: If the array has the wrong type or shape.
            ConfigError: If the augmentation changes the size or type of the image.
        """
        return self._as_tensor(self._transformed(squash(image, self.size), draw))

    def _as_tensor(self, view: np.ndarray) -> torch.Tensor:
        if view.shape != (self.size, self.size, 3) or view.dtype != np.uint8:
            raise ConfigError(
                f"The augmentation {self.augmentation.name:.100} returns {view.dtype} {view.shape}, but views must be "
                f"uint8 {(self.size, self.size, 3)}. Use transforms that keep the size and type."
            )
        return to_tensor(view)

    def _transformed(self, image: np.ndarray, draw: Draw) -> np.ndarray:
        key = (self._stream, draw.epoch, draw.visit, draw.index)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        # The whole pipeline uses one stream. With albumentations' set_random_seed, all transforms would start with the
        # same state, which would correlate, for example, the position of the cutout with the choice of the flip.
        self._pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))  # noqa: S311
        transformed: np.ndarray = self._pipeline(image=image)["image"]
        return transformed


class WeakView(_RandomView):
    """View that is resized to (size, size) and to which the weak augmentation is applied.

    Args:
        size: Side of the view, in pixels.
        seed: Seed of the augmentation.
        augmentation: The random transforms. None uses :class:`Flip`: the view is the plain view or its mirror image.

    Raises:
        ConfigError: If the size is below 1 or the seed is negative.
    """

    def __init__(self, size: int, seed: int, augmentation: Augmentation | None = None) -> None:
        super().__init__(size, seed, _WEAK, augmentation or Flip())

    @property
    def only_flips(self) -> bool:
        """Whether each view is the plain view or its mirror image."""
        return type(self.augmentation) is Flip

    def flips(self, draw: Draw) -> bool:
        """Returns whether the view of a draw is mirrored, without computing it. Requires :attr:`only_flips`."""
        return bool(self._transformed(_LEFT_TO_RIGHT, draw)[0, 0, 0])


class StrongView(_RandomView):
    """View that is resized to (size, size) and to which the strong augmentation is applied.

    Args:
        size: Side of the view, in pixels.
        seed: Seed of the augmentation.
        augmentation: The random transforms. None uses :class:`CutoutRandAugment`.

    Raises:
        ConfigError: If the size is below 1 or the seed is negative.
    """

    def __init__(self, size: int, seed: int, augmentation: Augmentation | None = None) -> None:
        super().__init__(size, seed, _STRONG, augmentation or CutoutRandAugment())
