"""Sources that take their classes from a checkpoint if the training annotations are not available."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cbsa_lightning.arguments import check_names
from cbsa_lightning.data.annotations import AnnotationTable, as_strings
from cbsa_lightning.data.class_names import ClassFile
from cbsa_lightning.data.readers.source import Source
from cbsa_lightning.errors import DataError


class Classes(Source):
    """Class names and prompt names without images.

    Args:
        class_names: The C class names.
        prompt_names: The C prompt names.

    Raises:
        ConfigError: If names are empty or repeated, or the number of prompt names is wrong.
    """

    def __init__(self, class_names: Sequence[str], prompt_names: Sequence[str]) -> None:
        self._class_names = tuple(check_names("class_names", class_names))
        self._prompt_names = tuple(check_names("prompt_names", prompt_names, len(self._class_names)))

    @property
    def class_names(self) -> tuple[str, ...]:
        """As given."""
        return self._class_names

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """As given."""
        return self._prompt_names

    def prepare(self) -> None:
        """Does nothing, since no files are needed."""

    def train(self) -> AnnotationTable:
        """Not available.

        Raises:
            DataError: Always.
        """
        raise DataError("Classes without a data set have no images to train or to test on; give a data source.")

    def test(self) -> AnnotationTable | None:
        """Not available; see :meth:`train`."""
        return self.train()


class TestImages(Classes):
    """The test images of a source with the classes of a checkpoint; the training table is empty.

    Args:
        source: The source; its training annotations are not read.
        checkpoint: Checkpoint file with the classes, for messages.
        class_names: The C class names of the checkpoint.
        prompt_names: The C prompt names.
    """

    __test__ = False  # not a test case of pytest

    def __init__(
        self, source: Source, checkpoint: str, class_names: Sequence[str], prompt_names: Sequence[str]
    ) -> None:
        super().__init__(class_names, prompt_names)
        self._source, self._checkpoint = source, Path(checkpoint)

    def train(self) -> AnnotationTable:
        """Returns a table without rows."""
        labels = np.empty((0, len(self.class_names)), dtype=np.int8)
        return AnnotationTable(Path(), as_strings([]), labels, self.class_names, self.prompt_names)

    def test(self) -> AnnotationTable:
        """Returns the test images.

        Raises:
            DataError: If the source has none, or other classes.
        """
        table = self._source.test_under(ClassFile(self._checkpoint, self.class_names, self.prompt_names, {}))
        if table is None:
            raise DataError(
                "There are no test annotations, and the training annotations are missing; give one of them."
            )
        return table
