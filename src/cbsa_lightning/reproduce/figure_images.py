"""The images of Fig. 4 and 7: the test images of a run, or a folder."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch

from cbsa_lightning.cli.check import source_of
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.labels.versions import checkpoint_and_run
from cbsa_lightning.io.runs import CONFIG
from cbsa_lightning.reports.telling_images import evenly_spaced


class Model(NamedTuple):
    """A trained model.

    Attributes:
        file: Its checkpoint.
        run: The folder of its run; None for a checkpoint outside of a run.
        classifier: The classifier, on a GPU if there is one.
    """

    file: Path
    run: Path | None
    classifier: Classifier


def load_model(source: Path) -> Model:
    """Loads the model of a run or of a checkpoint.

    Raises:
        ConfigError: If the run has no checkpoint.
        CheckpointError: See :meth:`~cbsa_lightning.inference.classifier.Classifier.load`.
    """
    file, run = checkpoint_and_run(source)
    return Model(file, run, Classifier.load(file, "cuda" if torch.cuda.is_available() else "cpu"))


def images_of(model: Model, folder: Path | None, most: int | None = None) -> tuple[list[Path], list[str]]:
    """Returns the files of the images, and their names in the annotations.

    Args:
        model: The model.
        folder: A folder, an image or a list of paths; None: the test images of the run.
        most: Maximum number of images, which are evenly spaced; None: all.

    Raises:
        ConfigError: If the run has no test images.
        DataError: If annotations or images are missing.
    """
    table = _test_images(model) if folder is None else read_images(folder, model.classifier.class_names)
    rows = range(len(table)) if most is None else evenly_spaced(len(table), most).tolist()
    return [table.file(row) for row in rows], [str(table.paths[row]) for row in rows]


def _test_images(model: Model) -> AnnotationTable:
    remedy = "Use --images FOLDER."
    config = None if model.run is None else model.run / CONFIG
    if config is None or not config.is_file():
        raise ConfigError(f"{model.file} is not in the folder of a run, so its test images are unknown. {remedy}")
    with redirect_stdout(sys.stderr):
        source, _ = source_of([str(config)])
        try:
            source.prepare()
            table = source.test()
        except DataError as error:
            raise DataError(
                f"{error} (test images of {model.run}; relative paths refer to the folder in which it was trained). "
                f"{remedy}"
            ) from error
    if table is None:
        raise ConfigError(f"The data set of {model.run} has no test images. {remedy}")
    return table
