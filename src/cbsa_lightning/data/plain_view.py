"""The plain view of an image, which is used for evaluation and inference and is the basis of all other views."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.errors import ConfigError, DataError

# Loader workers already run in parallel, and OpenCV's threads would compete with them.
cv2.setNumThreads(0)


class PlainView:
    """View for evaluation and inference, which only resizes the image.

    Args:
        size: Side of the view, in pixels.

    Raises:
        ConfigError: If the size is below 1.
    """

    def __init__(self, size: int) -> None:
        self.size = checked_size(size)

    def __call__(self, image: np.ndarray, draw: Draw | None = None) -> torch.Tensor:
        """Computes the view, which is not random.

        Args:
            image: (H, W, 3) uint8, RGB. It is not modified.
            draw: Ignored. All views have the same signature.

        Returns:
            (3, S, S) uint8, contiguous.

        Raises:
            DataError: If the array has the wrong type or shape.
        """
        return to_tensor(squash(image, self.size))


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image to a square without keeping the aspect ratio. If it has this size, it is returned as is.

    ``albumentations.Resize`` is not used, because OpenCV's bilinear filter reads only four pixels at any scale. It
    therefore causes aliasing when shrinking, and its results differ from those of the original models and protocols.

    Args:
        image: (H, W, 3) uint8, RGB. It is not modified.
        size: S, the side in pixels.

    Returns:
        (S, S, 3) uint8, contiguous unless it is ``image`` itself.

    Raises:
        DataError: If the array has the wrong type or shape.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(
            f"a view requires an image of (H, W, 3) uint8, found {image.dtype} of shape {image.shape}; decode() "
            "returns images in this format"
        )
    if image.shape[:2] == (size, size):
        return image
    # torch's antialiased bilinear filter equals Pillow's within one gray level and is several times faster.
    if not image.flags.writeable:  # torch warns about read-only memory
        image = image.copy()
    batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, as in the result
    resized = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Copies ``(H, W, 3)`` uint8 to ``(3, H, W)``."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)  # does not share memory with the input
    cv2.split(image, list(planes))  # the fastest way to transpose
    return torch.from_numpy(planes)


def checked_size(size: int) -> int:
    """Checks the side of a view and returns it.

    Raises:
        ConfigError: If the side is below 1.
    """
    if size < 1:
        raise ConfigError(f"the size of a view is {size}; give its side in pixels, at least 1")
    return size
