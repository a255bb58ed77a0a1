"""Classes without a data set, for predictions by a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from cbsa_lightning.arguments import check_names
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers.source import Source
from cbsa_lightning.errors import DataError


class Classes(Source):
    """Class names and prompt names only; there are no images to train or to test on.

    Args:
        class_names: The C class names.
        prompt_names: How prompts spell them.

    Raises:
        ConfigError: For names that are empty or repeated, or another number of prompt names.
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
        """Nothing has to be there."""

    def train(self) -> AnnotationTable:
        """There is no training table.

        Raises:
            DataError: Always.
        """
        raise DataError("Classes without a data set have no images to train or to test on; give a data source.")

    def test(self) -> AnnotationTable | None:
        """There is no test table; see :meth:`train`."""
        return self.train()
