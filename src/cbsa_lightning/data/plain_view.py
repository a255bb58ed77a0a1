"""The plain view of an image: what evaluation, inference and the start of every other view need."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.errors import ConfigError, DataError

cv2.setNumThreads(0)  # the loader's processes are the parallelism; OpenCV's own threads would fight them


class PlainView:
    """The squash alone, for evaluation and inference.

    Args:
        size: Side of the view in pixels.

    Raises:
        ConfigError: A size below 1.
    """

    def __init__(self, size: int) -> None:
        self.size = checked_size(size)

    def __call__(self, image: np.ndarray, draw: Draw | None = None) -> torch.Tensor:
        """Makes the view; nothing about it is random, so ``draw`` changes nothing.

        Args:
            image: (H, W, 3) uint8, RGB; not changed.
            draw: Taken so that every view is called alike.

        Returns:
            (3, S, S) uint8, contiguous.

        Raises:
            DataError: The array is not of that form.
        """
        return to_tensor(squash(image, self.size))


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes to (size, size) without keeping the aspect ratio; an image of that size is returned as it is.

    Not ``albumentations.Resize``: OpenCV's bilinear reads four pixels whatever the scale, so it aliases when it
    shrinks, and differs from what the models and protocols were made with.

    Args:
        image: (H, W, 3) uint8, RGB; not changed.
        size: S, the side in pixels.

    Returns:
        (S, S, 3) uint8, contiguous unless it is ``image`` itself.

    Raises:
        DataError: The array is not of that form.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(
            f"a view needs an image of (H, W, 3) uint8, found {image.dtype} of shape {image.shape}; "
            "decode() gives that form"
        )
    if image.shape[:2] == (size, size):
        return image
    # Pillow's antialiased bilinear filter, by torch: within one gray level, and several times faster.
    if not image.flags.writeable:  # torch warns about memory that it could not write to
        image = image.copy()
    batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, and so is the result
    resized = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Copies ``(H, W, 3)`` uint8 to ``(3, H, W)``."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)  # new memory, never the caller's
    cv2.split(image, list(planes))  # the fastest of the ways to transpose
    return torch.from_numpy(planes)


def checked_size(size: int) -> int:
    """Returns the side of a view.

    Raises:
        ConfigError: If it is below 1.
    """
    if size < 1:
        raise ConfigError(f"the size of a view is {size}; give its side in pixels, 1 or more")
    return size
