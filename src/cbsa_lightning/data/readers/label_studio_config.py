"""Reading of the labeling configuration of a Label Studio project, which contains its classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from cbsa_lightning.data.class_names import did_you_mean
from cbsa_lightning.data.readers.structured import read_xml
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief


class Choices(NamedTuple):
    """A control with choices about an image.

    Attributes:
        name: Name of the control, which is the ``from_name`` of results.
        image: Name of the image, which is the ``to_name`` of results.
        key: Key of the image in the data of a task.
        classes: Names of the choices in results, which are aliases or values.
        prompts: Names of the choices that annotators see, which are values.
        controls: Names of all controls of the project.
        multiple: Whether an answer may contain several choices.
    """

    name: str
    image: str
    key: str
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    controls: frozenset[str]
    multiple: bool


def read_label_config(file: Path, control: str | None = None) -> Choices:
    """Reads the XML code that a project's settings contain under "Labeling Interface", "Code".

    Args:
        file: File with the XML code.
        control: Name of the control with the choices. Required if there are several.

    Raises:
        DataError: If the file is missing or is not XML; if it has no choices about a whole image, or several while
            ``control`` is None; or if the choices are nested or defined by the data of each task.
    """
    root = read_xml(file)
    images = {tag.get("name", ""): tag.get("value", "") for tag in _tags(root, "Image")}
    found = {
        tag.get("name", ""): tag
        for tag in _tags(root, "Choices")
        if tag.get("toName") in images and "true" not in (tag.get("perRegion"), tag.get("perItem"))
    }
    if not found:
        kinds = sorted({tag.tag for tag in root.iter() if tag.get("toName")})
        raise DataError(
            f"{file}: the file has no Choices about a whole Image, only {listed(map(brief, kinds)) or 'other tags'}; "
            "use a project in which choices are assigned to images"
        )
    if control is None and len(found) > 1:
        raise DataError(
            f"{file}: the file has several Choices: {listed(map(brief, found))}; set control to one of them"
        )
    name = next(iter(found)) if control is None else control
    if name not in found:
        raise DataError(
            f"{file}: the file has no Choices {brief(name)} about an image{did_you_mean(name, found)}, only "
            f"{listed(map(brief, found))}; correct control"
        )
    image = found[name].get("toName", "")
    key = images[image]
    if len(key) < 2 or key[0] != "$":
        raise DataError(f"{file}: Image {brief(image)} has value={brief(key)}, which is not a task key such as $image")
    classes, prompts = _choices(file, found[name])
    controls = frozenset(tag.get("name", "") for tag in root.iter() if tag.get("toName"))
    multiple = found[name].get("choice") == "multiple"
    return Choices(name, image, key[1:], classes, prompts, controls, multiple)


def _choices(file: Path, control: Element) -> tuple[tuple[str, ...], tuple[str, ...]]:
    where = f"{file}, Choices {brief(control.get('name'))}"
    choices = list(_tags(control, "Choice"))
    if not choices:
        raise DataError(f"{where}: there is no Choice; add the choices, or omit label_config and give class_file")
    for choice in choices:
        if not choice.get("value"):
            raise DataError(f"{where}: a Choice has no value; add one")
        if len(list(_tags(choice, "Choice"))) > 1:
            raise DataError(
                f"{where}: there are choices within {brief(choice.get('value'))}; nested choices are not supported"
            )
    values = tuple(choice.get("value", "") for choice in choices)
    return tuple(choice.get("alias") or value for choice, value in zip(choices, values, strict=True)), values


def _tags(root: Element, name: str) -> Iterator[Element]:
    """Yields elements with this name in ``root`` and below. As in Label Studio, case is ignored."""
    return (tag for tag in root.iter() if tag.tag.lower() == name.lower())
