"""The plain view of an image, used for evaluation and inference and as the basis of all other views."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.errors import ConfigError, DataError

cv2.setNumThreads(0)  # loader workers run in parallel already; OpenCV's threads would compete with them


class PlainView:
    """Only resizes the image, for evaluation and inference.

    Args:
        size: Side of the view in pixels.

    Raises:
        ConfigError: If the size is below 1.
    """

    def __init__(self, size: int) -> None:
        self.size = checked_size(size)

    def __call__(self, image: np.ndarray, draw: Draw | None = None) -> torch.Tensor:
        """Computes the view. It is not random, so ``draw`` is ignored.

        Args:
            image: (H, W, 3) uint8, RGB; not changed.
            draw: Ignored; present so that all views have the same signature.

        Returns:
            (3, S, S) uint8, contiguous.

        Raises:
            DataError: If the array has the wrong form.
        """
        return to_tensor(squash(image, self.size))


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes to (size, size) without keeping the aspect ratio. An image of that size is returned unchanged.

    This is not ``albumentations.Resize``: OpenCV's bilinear filter reads four pixels at any scale, so it aliases when
    shrinking, and its results differ from those that the models and protocols were made with.

    Args:
        image: (H, W, 3) uint8, RGB; not changed.
        size: S, the side in pixels.

    Returns:
        (S, S, 3) uint8, contiguous unless it is ``image`` itself.

    Raises:
        DataError: If the array has the wrong form.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(
            f"a view needs an image of (H, W, 3) uint8, found {image.dtype} of shape {image.shape}; "
            "decode() returns that form"
        )
    if image.shape[:2] == (size, size):
        return image
    # torch's version of Pillow's antialiased bilinear filter: equal within one gray level, and several times faster.
    if not image.flags.writeable:  # torch warns about read-only memory
        image = image.copy()
    batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, like the result
    resized = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Copies ``(H, W, 3)`` uint8 to ``(3, H, W)``."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)  # never the caller's memory
    cv2.split(image, list(planes))  # the fastest way to transpose
    return torch.from_numpy(planes)


def checked_size(size: int) -> int:
    """Returns the side of a view.

    Raises:
        ConfigError: If it is below 1.
    """
    if size < 1:
        raise ConfigError(f"the size of a view is {size}; give its side in pixels, 1 or more")
    return size
