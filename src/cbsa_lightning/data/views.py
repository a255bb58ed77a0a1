"""Views of an image: weak and strong. The only module that imports albumentations.

albumentations uses the same random stream in every worker of a loader (observed with 2.0.8). Here, each call has its
own stream, a function of (seed, epoch, visit, index, view). Views therefore do not depend on the number of workers or
ranks, or on restarts.
"""

from __future__ import annotations

import os
import random
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before the import, which otherwise checks for updates online

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image

from cbsa_lightning.data.plain_view import PlainView, checked_size, squash, to_tensor
from cbsa_lightning.data.randaugment import Step, apply_step, draw_steps
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.errors import ConfigError

__all__ = ["PlainView", "StrongView", "WeakView", "squash"]

_WEAK, _STRONG = 0, 1  # separate random streams of one seed
_LEFT_TO_RIGHT = np.repeat(np.array([[[0], [1]]], np.uint8), 3, axis=2)  # an image that shows whether it was mirrored


class _Cutout(A.ImageOnlyTransform):  # type: ignore[misc]  # no types
    """Paints one rectangle in one random color.

    Its sides are int(share * side + 0.5) and its center is uniform over the image; parts outside the image are
    clipped. Both end pixels are painted, so at 224 pixels and a share of 0.5 the whole square has 113.
    """

    def __init__(self, share: float) -> None:
        super().__init__(p=1.0)
        self.share = share

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        (top, bottom), (left, right) = (self._extent(side) for side in params["shape"][:2])
        color = tuple(self.py_random.randrange(256) for _ in range(3))
        return {"area": (slice(top, bottom), slice(left, right)), "color": color}

    def _extent(self, side: int) -> tuple[int, int]:
        half = int(self.share * side + 0.5) // 2
        center = self.py_random.randrange(side)
        return max(0, center - half), center + half + 1

    def apply(self, img: np.ndarray, area: tuple[slice, slice], color: tuple[int, ...], **params: Any) -> np.ndarray:
        img = img.copy()
        rows, columns = area
        # Both corners are painted. Assigning the color to slices gives the same result, ten times slower.
        cv2.rectangle(img, (columns.start, rows.start), (columns.stop - 1, rows.stop - 1), color, cv2.FILLED)
        return img


class _RandAugment(A.ImageOnlyTransform):  # type: ignore[misc]  # no types
    """The steps of :mod:`cbsa_lightning.data.randaugment`, drawn from albumentations' stream."""

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        return {"steps": draw_steps(self.py_random)}

    def apply(self, img: np.ndarray, steps: tuple[Step, ...], **params: Any) -> np.ndarray:
        if not steps:
            return img
        picture = Image.fromarray(img)
        for step in steps:
            picture = apply_step(picture, step)
        return np.asarray(picture)


class _RandomView:
    """Resizes the image, then applies transforms that are reseeded for every call. Not thread-safe.

    Resizing comes first, so that a cached resized image gives the same view as its file.
    """

    def __init__(self, size: int, seed: int, stream: int, transforms: list[A.BasicTransform]) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}; give an integer of 0 or more")
        self.size, self.seed, self._stream = checked_size(size), seed, stream
        self._pipeline = A.Compose(transforms)

    def __call__(self, image: np.ndarray, draw: Draw) -> torch.Tensor:
        """Computes the view for a draw.

        Args:
            image: (H, W, 3) uint8, RGB; not changed.
            draw: Image index, epoch, and repeat within the epoch.

        Returns:
            (3, S, S) uint8, contiguous.

        Raises:
            DataError: If the array has another form.
        """
        return to_tensor(self._transformed(squash(image, self.size), draw))

    def _transformed(self, image: np.ndarray, draw: Draw) -> np.ndarray:
        key = (self._stream, draw.epoch, draw.visit, draw.index)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        # One stream for the whole pipeline: set_random_seed of albumentations would start all transforms at the same
        # point, which would correlate, for example, the position of the cutout with the choice of the flip.
        self._pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))  # noqa: S311
        transformed: np.ndarray = self._pipeline(image=image)["image"]
        return transformed


class WeakView(_RandomView):
    """Resizes to (size, size), then flips horizontally with probability 0.5: the plain view or its mirror image.

    Args:
        size: Side of the view in pixels.
        seed: Seed of the flips.

    Raises:
        ConfigError: If the size is below 1 or the seed is negative.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed, _WEAK, [A.HorizontalFlip(p=0.5)])

    def flips(self, draw: Draw) -> bool:
        """Returns whether the view of a draw is mirrored, without computing it."""
        return bool(self._transformed(_LEFT_TO_RIGHT, draw)[0, 0, 0])


class StrongView(_RandomView):
    """Resizes and flips as the weak view does, then applies Cutout and RandAugment.

    Args:
        size: Side of the view in pixels.
        seed: Seed of the random transforms.
        cutout: Side of the cut-out rectangle as a fraction of the view's side; 0 disables Cutout.

    Raises:
        ConfigError: If the size is below 1, the seed is negative, or ``cutout`` is not between 0 and 1.
    """

    def __init__(self, size: int, seed: int, cutout: float = 0.5) -> None:
        if not 0 <= cutout <= 1:
            raise ConfigError(f"cutout is {cutout}; give a fraction of the side from 0 (none) to 1")
        self.cutout = cutout
        transforms = [A.HorizontalFlip(p=0.5), _Cutout(cutout), _RandAugment()]
        if cutout == 0:
            del transforms[1]
        super().__init__(size, seed, _STRONG, transforms)
