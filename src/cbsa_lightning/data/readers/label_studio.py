"""Exports of Label Studio as JSON, JSON_MIN, CSV or TSV, with choices about images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from cbsa_lightning.arguments import check_choice, check_kind, check_paths
from cbsa_lightning.data.readers.answers import Record
from cbsa_lightning.data.readers.exports import Content, Export
from cbsa_lightning.data.readers.label_studio_config import Choices, read_label_config
from cbsa_lightning.data.readers.label_studio_rows import read_csv, read_json_min
from cbsa_lightning.data.readers.label_studio_tasks import locate, read_tasks
from cbsa_lightning.data.readers.structured import read_json, typed
from cbsa_lightning.errors import DataError


class LabelStudio(Export):
    """Export of a Label Studio project in which annotators choose labels for images.

    A submitted answer contains the classes that an image shows. All other classes are absent, even if it contains no
    class. If a task was skipped, or has only a draft or no answer, the image is unlabeled. Predictions are not read.

    The image is given by ``path`` in the data of a task. If there is no ``path``, the image is found by its path or URL
    (see ``find_images``). Several tasks of one image are combined.

    Args:
        train: Export of the training images as JSON, JSON_MIN, CSV or TSV. JSON is recommended, since only this format
            marks skipped tasks.
        test: Export of the test images.
        root: Folder that contains the images. Defaults to the folder that contains each export.
        class_file: Class file with prompt names, and with the class list if there is no ``label_config``.
        label_config: XML of the labeling interface of the project, which contains all choices. An export contains only
            those in use.
        control: Name of the control with the choices. Required if there are several.
        prefix: Path or URL of ``root`` in the project, such as "photos" for "/data/local-files/?d=photos/a.jpg".
        nothing: Choices that mean "shows no class". They are not classes.
        disagreement: Label of a class if the answers for an image differ: "unknown", or "majority" for the label of the
            majority (unknown if there is a tie).

    Raises:
        ConfigError: If an argument has the wrong type.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        root: str | None = None,
        class_file: str | None = None,
        label_config: str | None = None,
        control: str | None = None,
        prefix: str | None = None,
        nothing: Sequence[str] = (),
        disagreement: Literal["unknown", "majority"] = "unknown",
    ) -> None:
        super().__init__(train, test, root, class_file, nothing, disagreement)
        check_choice("LabelStudio: disagreement", disagreement, ("unknown", "majority"))
        check_paths(**{"LabelStudio: label_config": label_config})
        check_kind("LabelStudio: control", control, str, "the name of a control")
        check_kind("LabelStudio: prefix", prefix, str, "a path or URL")
        self._label_config, self._control, self._prefix = label_config, control, prefix

    def _other_files(self) -> list[tuple[str, str | None]]:
        return [("label_config", self._label_config)]

    @cached_property
    def _choices(self) -> Choices | None:
        return None if self._label_config is None else read_label_config(Path(self._label_config), self._control)

    def _load(self, file: Path, root: Path) -> Content:
        name, key, choices = self._control, "image", self._choices
        if choices is not None:
            name, key = choices.name, choices.key
        if file.suffix.lower() in (".csv", ".tsv"):
            tasks, notes = read_csv(file, name, key)
        else:
            content = typed(read_json(file), (list,), f"{file}: an export")
            records = [typed(task, (dict,), f"{file}, record {i + 1}") for i, task in enumerate(content)]
            if not records:
                raise DataError(f"{file}: the file contains no tasks; export a project with tasks")
            if "annotation_id" in records[0]:
                tasks, notes = read_json_min(file, records, name, key)
            else:
                tasks, notes = read_tasks(file, records, name, key, choices)
        paths, found = locate(tasks, root, self._prefix)
        records = [Record(path, task.where, task.answers) for path, task in zip(paths, tasks, strict=True)]
        notes += found
        if choices is None:
            return Content(records, notes=notes)
        return Content(records, choices.classes, choices.prompts, notes)
