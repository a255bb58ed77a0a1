"""Labels of new images by a checkpoint, without the data of its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from cbsa_lightning.data.readers.unlabelled import read_images
from cbsa_lightning.inference import Classifier
from cbsa_lightning.labels.image_labels import SURE, ImageLabels

BATCH = 64


def label_images(checkpoint: Path, images: Path) -> ImageLabels:
    """Labels images with the network of a CBSAModule.

    Args:
        checkpoint: Of the run.
        images: A folder, an image, or a list or table of paths.

    Raises:
        CheckpointError: For the checkpoint of another network; see :meth:`Classifier.load`.
        DataError: An image cannot be read, or there is none.
    """
    classifier = Classifier.load(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    table = read_images(images, classifier.class_names)
    files = [table.file(row) for row in range(len(table))]
    parts = []
    with tqdm(total=len(files), desc="Labels", unit="image", leave=False) as bar:
        for start in range(0, len(files), BATCH):
            parts.append(classifier.scores(files[start : start + BATCH], BATCH))
            bar.update(len(parts[-1]))
    scores = torch.cat(parts).numpy().astype(np.float32)
    sure = SURE if classifier.calibrated else None
    return ImageLabels.decided(table.paths, classifier.class_names, scores, classifier.thresholds.numpy(), sure)
