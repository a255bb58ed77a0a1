"""Random transforms for weak and strong views. The configuration selects which ones are used.

All random numbers are drawn by albumentations, which :mod:`cbsa_lightning.data.views` seeds for each view.
"""

from __future__ import annotations

import copy
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

# Must be set before albumentations is imported, because the import otherwise accesses the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from PIL import Image

from cbsa_lightning.arguments import check_kind, check_number
from cbsa_lightning.data.randaugment import Step, apply_step, draw_steps
from cbsa_lightning.errors import ConfigError


class Augmentation(ABC):
    """Random transforms of an image that has been resized to a square. Subclass it to use other transforms.

    Attributes:
        name: Identifies the augmentation and its settings in the keys of cached features. Augmentations that can
            produce different views must have different names.
    """

    name: str

    @abstractmethod
    def transforms(self) -> list[A.BasicTransform]:
        """Returns the transforms of uint8 images ``(S, S, 3)``, in order."""

    def pipeline(self) -> A.Compose:
        """Returns the transforms as one callable with a random state that can be set."""
        return A.Compose(self.transforms())


class Flip(Augmentation):
    """A horizontal flip with probability 0.5, as in the paper's weak view."""

    name = "flip"

    def transforms(self) -> list[A.BasicTransform]:
        """Returns the flip."""
        return [A.HorizontalFlip(p=0.5)]


class CutoutRandAugment(Augmentation):
    """A horizontal flip, followed by Cutout and RandAugment, as in the paper's strong view.

    Args:
        cutout: Side of the cut-out rectangle as a fraction of the image's side. 0 disables Cutout.

    Raises:
        ConfigError: If the fraction is not between 0 and 1.
    """

    def __init__(self, cutout: float = 0.5) -> None:
        check_number("cutout", cutout, 0, 1)
        self.cutout = cutout
        self.name = f"cutout {cutout}"

    def transforms(self) -> list[A.BasicTransform]:
        """Returns flip, Cutout and RandAugment."""
        cutout = [_Cutout(self.cutout)] if self.cutout else []
        return [A.HorizontalFlip(p=0.5), *cutout, _RandAugment()]


class Albumentations(Augmentation):
    """A list of albumentations transforms.

    Args:
        transforms: The transforms, in order. They must keep the size of the image.

    Raises:
        ConfigError: If an entry is not an albumentations transform, or cannot be serialized.

    Example:
        In a configuration:

            data:
              strong_view:
                class_path: Albumentations
                init_args:
                  transforms:
                  - class_path: albumentations.HorizontalFlip
                  - {class_path: albumentations.ColorJitter, init_args: {p: 0.8}}
    """

    def __init__(self, transforms: Sequence[A.BasicTransform]) -> None:
        for transform in transforms:
            check_kind("transforms", transform, A.BasicTransform, "albumentations transforms")
        self._transforms = list(transforms)
        try:
            self.name = json.dumps(A.Compose(self._transforms).to_dict()["transform"]["transforms"], sort_keys=True)
        except (NotImplementedError, TypeError) as error:
            raise ConfigError(
                f"transforms: albumentations cannot serialize them ({error}), so cached features would be "
                "ambiguous. Write a subclass of Augmentation that has a name."
            ) from error

    def transforms(self) -> list[A.BasicTransform]:
        """Returns a copy of the transforms, since each view seeds its own copy."""
        return copy.deepcopy(self._transforms)


class _Cutout(A.ImageOnlyTransform):  # type: ignore[misc]  # no types
    """Paints one rectangle in one random color.

    Each side has int(share * side + 0.5) pixels, and the center is distributed uniformly over the image. Parts outside
    the image are clipped. Because both end pixels are painted, the square has 113 pixels for 224 pixels and share 0.5.
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
        # The rectangle includes both corners. Assigning the color to slices is equivalent but ten times slower.
        cv2.rectangle(img, (columns.start, rows.start), (columns.stop - 1, rows.stop - 1), color, cv2.FILLED)
        return img


class _RandAugment(A.ImageOnlyTransform):  # type: ignore[misc]  # no types
    """RandAugment as in :mod:`cbsa_lightning.data.randaugment`, with albumentations' random stream."""

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
