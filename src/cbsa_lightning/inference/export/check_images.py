"""Writes `check.npz`, which contains generated images and their scores for the test of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cbsa_lightning.data.plain_view import PlainView
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.io.files import replacing

CHECK = "check.npz"
NUMBER = 8


def check_images(size: int) -> list[NDArray[np.uint8]]:
    """Returns eight smooth random images ``(H, W, 3)``, some smaller and some larger than the model's input.

    The images are generated because the training images may be private.
    """
    rng = np.random.default_rng(0)
    images = []
    for i in range(NUMBER):
        height, width = (round(size * factor) for factor in rng.uniform(0.5, 2.0, 2)) if i else (size, size)
        coarse = torch.from_numpy(rng.uniform(-100, 355, (1, 3, 4 + i, 4 + i)))
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
        images.append(smooth[0].permute(1, 2, 0).round().to(torch.uint8).contiguous().numpy())
    return images


def write_check(folder: Path, classifier: Classifier) -> None:
    """Writes the images, the resized images, and the classifier's probabilities.

    Raises:
        OutputError: If the file cannot be written.
    """
    images = check_images(classifier.image_size)
    view = PlainView(classifier.image_size)
    arrays: dict[str, Any] = {f"image_{i}": image for i, image in enumerate(images)}
    arrays["views"] = np.stack([view(image).permute(1, 2, 0).numpy() for image in images])
    arrays["probabilities"] = classifier.scores(images, NUMBER).numpy()
    with replacing(folder / CHECK) as draft:
        np.savez_compressed(draft, **arrays)
