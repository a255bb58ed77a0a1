"""Weak and strong views of an image.

albumentations gives every worker process of a loader the same random stream (measured with 2.0.8). Here each
call gets a stream of its own, a function of (seed, epoch, visit, index, view), so the number of workers, the
number of ranks and a restart change no pixel.
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

_WEAK, _STRONG = 0, 1  # separate random streams of one seed
_LEFT_TO_RIGHT = np.repeat(np.array([[[0], [1]]], np.uint8), 3, axis=2)  # an image that tells whether it was mirrored


class _RandomView:
    """A squash, then transforms that are reseeded for every call. Not thread-safe.

    The squash comes first, so that a squashed image kept from before gives the same view as its file.
    """

    def __init__(self, size: int, seed: int, stream: int, augmentation: Augmentation) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}; give an integer of 0 or more")
        self.size, self.seed, self._stream = checked_size(size), seed, stream
        self.augmentation = augmentation
        self._pipeline = augmentation.pipeline()

    def __call__(self, image: np.ndarray, draw: Draw) -> torch.Tensor:
        """Makes the view of one draw.

        Args:
            image: (H, W, 3) uint8, RGB; not changed.
            draw: Which image this is, in which epoch, and for which time in it.

        Returns:
            (3, S, S) uint8, contiguous.

        Raises:
            DataError: The array is not of that form.
            ConfigError: The augmentation changes the size of the image.
        """
        return self._as_tensor(self._transformed(squash(image, self.size), draw))

    def _as_tensor(self, view: np.ndarray) -> torch.Tensor:
        if view.shape != (self.size, self.size, 3) or view.dtype != np.uint8:
            raise ConfigError(
                f"The augmentation {self.augmentation.name:.100} returns {view.dtype} {view.shape}, but views are "
                f"uint8 {(self.size, self.size, 3)}. Use transforms that keep size and type."
            )
        return to_tensor(view)

    def _transformed(self, image: np.ndarray, draw: Draw) -> np.ndarray:
        key = (self._stream, draw.epoch, draw.visit, draw.index)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        # One stream for the whole pipeline. Its set_random_seed would start every transform at the same
        # point, and tie, say, the place of the cutout to the choice of the flip.
        self._pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))  # noqa: S311
        transformed: np.ndarray = self._pipeline(image=image)["image"]
        return transformed


class WeakView(_RandomView):
    """Resizes to (size, size), then applies the weak augmentation.

    Args:
        size: Side of the view in pixels.
        seed: Seed of the augmentation.
        augmentation: The random transforms; None: :class:`Flip`, so that the view is the plain one or its mirror image.

    Raises:
        ConfigError: A size below 1 or a negative seed.
    """

    def __init__(self, size: int, seed: int, augmentation: Augmentation | None = None) -> None:
        super().__init__(size, seed, _WEAK, augmentation or Flip())

    @property
    def only_flips(self) -> bool:
        """Whether each view is the plain one or its mirror image."""
        return type(self.augmentation) is Flip

    def flips(self, draw: Draw) -> bool:
        """Whether the view of a draw is mirrored, for a view that :attr:`only_flips`; needs no image."""
        return bool(self._transformed(_LEFT_TO_RIGHT, draw)[0, 0, 0])


class StrongView(_RandomView):
    """Resizes to (size, size), then applies the strong augmentation.

    Args:
        size: Side of the view in pixels.
        seed: Seed of the augmentation.
        augmentation: The random transforms; None: :class:`CutoutRandAugment`.

    Raises:
        ConfigError: A size below 1 or a negative seed.
    """

    def __init__(self, size: int, seed: int, augmentation: Augmentation | None = None) -> None:
        super().__init__(size, seed, _STRONG, augmentation or CutoutRandAugment())
