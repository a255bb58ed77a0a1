"""Sources whose classes are read from a checkpoint, for use without training annotations."""

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
    """A source that provides class names and prompt names, but no images.

    Args:
        class_names: The C class names.
        prompt_names: The C prompt names.

    Raises:
        ConfigError: If a name is empty or repeated, or the number of prompt names is wrong.
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
        raise DataError("Classes without a data set have no images for training or testing; give a data source.")

    def test(self) -> AnnotationTable | None:
        """Raises an error; see :meth:`train`."""
        return self.train()


class TestImages(Classes):
    """The test images of a source, with the classes of a checkpoint. The training table is empty.

    Args:
        source: The source. Its training annotations are not read.
        checkpoint: Checkpoint file that contains the classes, for error messages.
        class_names: The C class names of the checkpoint.
        prompt_names: The C prompt names of the checkpoint.
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
            DataError: If the source has no test images, or its classes differ.
        """
        table = self._source.test_under(ClassFile(self._checkpoint, self.class_names, self.prompt_names, {}))
        if table is None:
            raise DataError("There are neither test annotations nor training annotations; give one of them.")
        return table
