"""Reading of tasks and annotations from a Label Studio export as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from cbsa_lightning.data.class_names import did_you_mean
from cbsa_lightning.data.readers.label_studio_config import Choices
from cbsa_lightning.data.readers.locations import find_images
from cbsa_lightning.data.readers.structured import counted, field, typed
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief


class Task(NamedTuple):
    """A task with its answers, or with one of them.

    Attributes:
        where: File and task, for error messages.
        image: Path or URL of the image.
        path: Path of the image relative to the root, or "" if the data of the task does not contain it.
        answers: The choices of each submitted answer.
    """

    where: str
    image: str
    path: str
    answers: list[list[str]]


def read_tasks(
    file: Path, tasks: list[dict[str, Any]], control: str | None, key: str, config: Choices | None
) -> tuple[list[Task], list[str]]:
    """Reads tasks and their annotations.

    Args:
        file: The export, for error messages.
        tasks: The tasks of the export.
        control: Name of the control with the choices. None uses the only control that has answers.
        key: Key of the image in the data of a task.
        config: Configuration of the project, if known.

    Returns:
        The tasks, and notes on other content of the file.

    Raises:
        DataError: If a field is missing or has the wrong type, tasks belong to several projects, or results are not
            choices about a whole image, or belong to several controls and ``control`` is None.
    """
    places = [f"{file}, task {brief(task['id'], 40)}" if "id" in task else f"{file}, record {i + 1}"
              for i, task in enumerate(tasks)]  # fmt: skip
    _refuse_projects(file, tasks, places)
    submitted, notes = _submitted(tasks, places)
    results = [
        (where, result)
        for where, of_task in zip(places, submitted, strict=True)
        for found in of_task
        for result in found
    ]
    control = _control(file, results, control, config)
    others = Counter(_kind(result) for _, result in results if result.get("from_name") != control)
    notes += [f"{counted(count, 'result')} of {kind}: not read" for kind, count in others.items()]
    read = []
    for task, where, of_task in zip(tasks, places, submitted, strict=True):
        image, path = image_of(field(task, "data", (dict,), where), key, where)
        answers = [
            [name for result in found if result.get("from_name") == control for name in _chosen(result, where, config)]
            for found in of_task
        ]
        read.append(Task(where, image, path, answers))
    return read, notes


def image_of(data: dict[str, Any], key: str, where: str) -> tuple[str, str]:
    """Returns the image and the path in the data of a task.

    Raises:
        DataError: If there is no image, or the image or path is not a string.
    """
    if key not in data:
        raise DataError(
            f"{where}: the data has no {key!r}, only {listed(map(brief, data)) or 'nothing'}; give the project's "
            "label_config, which defines the key of the image, and use a project about images"
        )
    path = field(data, "path", (str, type(None)), where, None)
    return typed(data[key], (str,), f"{where}: {key}"), path or ""


def locate(tasks: list[Task], root: Path, prefix: str | None) -> tuple[list[str], list[str]]:
    """Returns the image paths of ``tasks``, relative to ``root``, and notes on how they were found.

    Args:
        tasks: Tasks of an export.
        root: Folder that contains the images.
        prefix: Path or URL of ``root`` in the project; see :func:`find_images`.

    Raises:
        DataError: If an image is not found.
    """
    rest = [task for task in tasks if not task.path]
    paths, by_name = find_images([task.image for task in rest], root, prefix, lambda k: rest[k].where)
    found = iter(paths)
    located = [task.path or next(found) for task in tasks]
    notes = []
    if by_name:
        notes.append(f"{counted(len(by_name), 'record')} matched with an image only by its file name")
    if further := len(located) - len(set(located)):
        notes.append(f"{counted(further, 'further record')} of images that already have one")
    return located, notes


def _refuse_projects(file: Path, tasks: list[dict[str, Any]], places: list[str]) -> None:
    first: dict[Any, str] = {}
    for task, where in zip(tasks, places, strict=True):
        if "project" in task:
            first.setdefault(field(task, "project", (int, type(None)), where), where)
    if len(first) > 1:
        found = listed(f"{project} ({where})" for project, where in first.items())
        raise DataError(f"{file}: the file has tasks of several projects: {found}; export each project separately")


def _submitted(tasks: list[dict[str, Any]], places: list[str]) -> tuple[list[list[list[dict[str, Any]]]], list[str]]:
    """Returns the results of each submitted annotation of each task, and notes on other content."""
    submitted = []
    counts: Counter[str] = Counter()
    for task, where in zip(tasks, places, strict=True):
        found, skips = [], 0
        if "annotations" not in task:
            raise DataError(
                f"{where}: the task has no 'annotations', so the file is not an export; export the project as JSON"
            )
        for annotation in field(task, "annotations", (list,), where):
            typed(annotation, (dict,), f"{where}: an annotation")
            results = field(annotation, "result", (list,), where)
            results = [typed(result, (dict,), f"{where}: a result") for result in results]
            if field(annotation, "was_cancelled", (bool,), where, False):
                skips += 1
            else:
                found.append(results)
        submitted.append(found)
        drafts = len(field(task, "drafts", (list,), where, []))
        counts["skips"] += skips if found else 0
        counts["drafts"] += drafts if found else 0
        counts["predicted"] += bool(field(task, "predictions", (list,), where, []))
        if not found:
            counts["skipped" if skips else "draft" if drafts else "open"] += 1
    said = {
        "skipped": ("task", "skipped by an annotator: unlabeled"),
        "draft": ("task", "with only a draft: unlabeled"),
        "open": ("task", "without an answer: unlabeled"),
        "skips": ("skip", "of a task that another annotator answered: ignored"),
        "drafts": ("draft", "next to a submitted answer: not read"),
        "predicted": ("task", "with predictions, which are not read"),
    }
    return submitted, [f"{counted(counts[key], noun)} {rest}" for key, (noun, rest) in said.items() if counts[key]]


def _kind(result: dict[str, Any]) -> str:
    """Describes the type and the control of a result for error messages."""
    return f"{brief(result.get('type'), 40)} (control {brief(result.get('from_name'), 60)})"


def _control(
    file: Path, results: list[tuple[str, dict[str, Any]]], control: str | None, config: Choices | None
) -> str | None:
    """Returns the name of the control with the choices, or None if no answer has a result."""
    first: dict[str, str] = {}
    for where, result in results:
        name = result.get("from_name")
        if result.get("type") != "choices" and (control is None or name == control):
            raise DataError(
                f"{where}: the task has a result of {_kind(result)}, but only choices label an image: export a project "
                "with choices, or set control to the name of their control"
            )
        if isinstance(name, str):
            first.setdefault(name, where)
        elif result.get("type") == "choices":
            raise DataError(f"{where}: a result of choices has from_name {brief(name)}; export the file again")
        if config is not None and isinstance(name, str) and name not in config.controls:
            raise DataError(
                f"{where}: control {brief(name)} is not in label_config; use the export and the configuration of "
                "one project"
            )
    if control is None and len(first) > 1:
        found = listed(f"{brief(name)} ({where})" for name, where in first.items())
        raise DataError(f"{file}: there are results of several controls: {found}; set control to one of them")
    if control is not None and first and control not in first:
        raise DataError(
            f"{file}: no result belongs to control {brief(control)}{did_you_mean(control, first)}, only to "
            f"{listed(map(brief, first))}; correct control"
        )
    return next(iter(first), None) if control is None else control


def _chosen(result: dict[str, Any], where: str, config: Choices | None) -> list[str]:
    """Returns the choices of a result."""
    if config is not None and result.get("to_name") != config.image:
        found = f"{brief(result.get('to_name'))}, not about the image {brief(config.image)}"
        raise DataError(f"{where}: the choices are about {found}; export the project of label_config")
    value = field(result, "value", (dict,), where)
    if more := sorted(value.keys() - {"choices"}):
        raise DataError(
            f"{where}: the choices also have {listed(map(brief, more))}, so they label a region, but only choices "
            "about whole images are supported"
        )
    choices: list[str] = field(value, "choices", (list,), where)
    for choice in choices:
        typed(choice, (str,), f"{where}: a choice")
    return choices
