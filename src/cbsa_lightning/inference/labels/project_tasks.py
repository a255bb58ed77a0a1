"""Predictions for existing tasks of a Label Studio project.

To import predictions, send them as a list with `POST /api/projects/ID/import/predictions`. The server assigns each
prediction to a task by the id of the task. The data, metadata and annotations of the tasks do not change, whereas
importing whole tasks would create new tasks. The server silently drops predictions with unknown names or choices, so
this module checks both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cbsa_lightning.data.class_names import clean_name
from cbsa_lightning.data.readers.label_studio_config import Choices, read_label_config
from cbsa_lightning.data.readers.label_studio_tasks import Task, locate, read_tasks
from cbsa_lightning.data.readers.source import tidy_paths
from cbsa_lightning.data.readers.structured import counted, field, read_json, typed
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.inference.labels.image_labels import ImageLabels
from cbsa_lightning.inference.labels.tools import Json, label_studio_predictions
from cbsa_lightning.io.reading import brief


class Project(NamedTuple):
    """A Label Studio project, as described by its exported files.

    Attributes:
        export: JSON export of the tasks. The server includes open tasks only with ``download_all_tasks=true``.
        label_config: XML of the labeling interface. If it is None, the names of the control and the image are read from
            the annotations.
        control: Name of the Choices control if there are several.
        root: Folder that the image paths of the labels are relative to.
        prefix: Path or URL of ``root`` in the project; see :class:`LabelStudio`.
    """

    export: Path
    label_config: Path | None
    control: str | None
    root: Path
    prefix: str | None


def predictions_for_tasks(labels: ImageLabels, project: Project, model_version: str) -> tuple[list[Json], list[str]]:
    """Creates predictions for the tasks of a project, each with the id of its ``task``, in the order of the export.

    Args:
        labels: Labels of the images.
        project: The project with the tasks.
        model_version: Name of the model, which is displayed with its predictions.

    Returns:
        The predictions, and notes on other content: tasks of other images, images without a task, and annotations.

    Raises:
        DataError: If one of these problems is found:

            - The file is not a JSON export of one project with choices.
            - A task has no id, or the same id as another task.
            - An image does not exist, or no task has an image of ``labels``.
            - The choices of the project differ from the classes of ``labels``.
            - The names of the control and the image are unknown.
    """
    file = project.export
    tasks = _tasks(file)
    config = None if project.label_config is None else read_label_config(project.label_config, project.control)
    key, control = ("image", project.control) if config is None else (config.key, config.name)
    read, notes = read_tasks(file, tasks, control, key, config)
    ids = _ids(tasks, read)
    control, image = _names(file, tasks, control, config)
    choices, found = _choices(labels, read, project, config)
    notes += found
    paths, found = locate(read, project.root, project.prefix)
    notes += found
    paths = tidy_paths(project.root, project.root, paths, lambda i: read[i].where).tolist()
    spelled = replace(labels, class_names=choices)
    of_image = dict(
        zip(labels.images.tolist(), label_studio_predictions(spelled, model_version, control, image), strict=True)
    )
    made = [{"task": number, **of_image[path]} for number, path in zip(ids, paths, strict=True) if path in of_image]
    if not made:
        raise DataError(
            f"{file}: no task has an image of the run. The tasks have {listed(map(brief, paths), 3)}; the run's "
            f"images are {listed(map(brief, of_image), 3)}. Use the export of the project with these images"
        )
    notes += _unmatched(paths, of_image)
    if answered := sum(path in of_image and bool(task.answers) for path, task in zip(paths, read, strict=True)):
        notes.append(f"{counted(answered, 'task')} with an answer: also predicted, but annotations do not change")
    return made, notes


def _unmatched(paths: list[str], of_image: dict[str, Json]) -> list[str]:
    """Returns notes on tasks without an image of the run and on images without a task."""
    notes = []
    if other := [path for path in paths if path not in of_image]:
        notes.append(
            f"{counted(len(other), 'task')} of images that the run does not label (for example, labeled images) get "
            f"no prediction: {listed(map(brief, other), 5)}"
        )
    if alone := list(of_image.keys() - set(paths)):
        notes.append(
            f"{counted(len(alone), 'image')} of the run without a task in the export (open tasks are exported with "
            f"download_all_tasks=true): {listed(map(brief, sorted(alone)), 5)}"
        )
    return notes


def _tasks(file: Path) -> list[dict[str, Any]]:
    if file.suffix.lower() != ".json":
        raise DataError(f"{file} is not a JSON file; export the project as JSON")
    tasks: list[dict[str, Any]] = typed(read_json(file), (list,), f"{file}: an export")
    if not tasks:
        raise DataError(f"{file} has no tasks; export a project with tasks")
    for i, task in enumerate(tasks):
        if "annotation_id" in typed(task, (dict,), f"{file}, record {i + 1}"):
            raise DataError(f"{file} is a JSON_MIN export, which lacks the names of controls; export as JSON")
    return tasks


def _ids(tasks: list[dict[str, Any]], read: list[Task]) -> list[int]:
    first: dict[int, str] = {}
    for i, (task, known) in enumerate(zip(tasks, read, strict=True)):
        number = field(task, "id", (int,), known.where)
        if number in first:
            raise DataError(f"{known.where}: record {i + 1} has the id of another task; export the project again")
        first[number] = known.where
    return list(first)


def _names(file: Path, tasks: list[dict[str, Any]], control: str | None, config: Choices | None) -> tuple[str, str]:
    """Returns the names of the Choices control and of its image; the types of the fields must be valid."""
    if config is not None:
        return config.name, config.image
    pairs = {
        (result["from_name"], typed(result.get("to_name"), (str,), f"{file}: to_name of a result")): None
        for task in tasks
        for annotation in task["annotations"]
        if not annotation.get("was_cancelled")
        for result in annotation["result"]
        if result.get("type") == "choices" and control in (None, result["from_name"])
    }
    if len(pairs) != 1:
        found = f"several: {listed(pairs)}" if pairs else "none with choices"
        raise DataError(
            f"{file}: its annotations do not define the control and image of predictions ({found}). Save the "
            "labeling interface of the project (Settings, Code) and pass it with --label_config"
        )
    return next(iter(pairs))


def _choices(
    labels: ImageLabels, read: list[Task], project: Project, config: Choices | None
) -> tuple[tuple[str, ...], list[str]]:
    """Returns the project's spelling of each class, and notes on classes and choices without a counterpart."""
    used = {choice: task.where for task in read for answer in task.answers for choice in answer}
    listing = used if config is None else config.classes
    spelled = {clean_name(choice): choice for choice in listing}
    names = tuple(spelled.get(name, name) for name in labels.class_names)
    missing = [brief(name) for name in labels.class_names if name not in spelled]
    further = [choice for name, choice in spelled.items() if name not in labels.class_names]
    if config is None:
        if further:
            found = listed(f"{brief(choice)} ({used[choice]})" for choice in further)
            raise DataError(
                f"{project.export} has choices that are not classes of the run: {found}. Use the export of the run's "
                "project, or pass its labeling interface with --label_config"
            )
        unchecked = f"no annotation uses {len(missing)} of the {len(names)} classes, which may not be choices"
        return names, [f"{unchecked} of the project (use --label_config): {listed(missing, 5)}"] if missing else []
    if missing:
        raise DataError(
            f"{project.label_config} has no choice for these classes of the run: {listed(missing)}. The server would "
            "drop their predictions. Add the choices to the project, or use the files of the run's project"
        )
    if not config.multiple and (several := int((labels.given.sum(1) > 1).sum())):
        raise DataError(
            f"{project.label_config}: Choices {brief(config.name)} allows one choice per image, but the run predicts "
            f'more than one for {counted(several, "image")}. Set choice="multiple" in the labeling interface'
        )
    if strange := [f"{brief(choice)} ({place})" for choice, place in used.items() if choice not in config.classes]:
        raise DataError(
            f"{project.export} has choices that are not in {project.label_config}: {listed(strange)}; use files of the "
            "same project"
        )
    note = f"{counted(len(further), 'choice')} of the project without a class of the run, never predicted: "
    return names, [note + listed(map(brief, further), 5)] if further else []
