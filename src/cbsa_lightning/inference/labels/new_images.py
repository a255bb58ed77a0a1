"""Labels new images with a checkpoint, without the training data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.labels.image_labels import SURE, ImageLabels
from cbsa_lightning.inference.predictions import write_predictions
from cbsa_lightning.io.runs import PREDICTIONS

BATCH = 64


def label_images(checkpoint: Path, images: Path) -> ImageLabels:
    """Labels images with the network of a CBSAModule.

    Args:
        checkpoint: Checkpoint of the run.
        images: A folder, an image, or a list or table of paths.

    Raises:
        CheckpointError: If the checkpoint belongs to another network; see :meth:`Classifier.load`.
        DataError: If there are no images, or one cannot be read.
    """
    classifier, table, scores = _scored(checkpoint, images)
    sure = SURE if classifier.calibrated else None
    return ImageLabels.decided(table.paths, classifier.class_names, scores, classifier.thresholds.numpy(), sure)


def predict(words: Sequence[str]) -> Path:
    """Runs `cbsa predict` without a configuration, and writes the predictions of a checkpoint as a table.

    Args:
        words: Command-line arguments after ``predict``.

    Returns:
        The output file.

    Raises:
        ConfigError: If the output exists or cannot be written.
        CheckpointError: See :func:`label_images`.
        DataError: See :func:`label_images`.
    """
    parser = argparse.ArgumentParser(
        prog="cbsa predict",
        allow_abbrev=False,
        description="Labels images with a checkpoint of CBSA. For more options and for other systems, add "
        "--config RUN/config.yaml.",
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="the checkpoint")
    parser.add_argument(
        "--data.predict", dest="images", type=Path, required=True, help="folder, image or list of paths"
    )
    parser.add_argument("--predictions.output", dest="output", type=Path, default=Path(PREDICTIONS), help="output file")
    args = parser.parse_args(words)
    if args.output.exists():
        raise ConfigError(f"{args.output} exists already. Choose another --predictions.output, or move the file.")
    classifier, table, scores = _scored(args.ckpt_path, args.images)
    write_predictions(args.output, table, classifier.class_names, scores, scores >= classifier.thresholds.numpy())
    print(f"Predictions of {len(table)} images: {args.output}")
    output: Path = args.output
    return output


def _scored(checkpoint: Path, images: Path) -> tuple[Classifier, AnnotationTable, NDArray[np.float32]]:
    """Returns the classifier, the images and their scores ``(n, C)``."""
    classifier = Classifier.load(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    table = read_images(images, classifier.class_names)
    files = [table.file(row) for row in range(len(table))]
    parts = []
    with tqdm(total=len(files), desc="Labels", unit="image", leave=False) as bar:
        for start in range(0, len(files), BATCH):
            parts.append(classifier.scores(files[start : start + BATCH], BATCH))
            bar.update(len(parts[-1]))
    return classifier, table, torch.cat(parts).numpy().astype(np.float32)
