"""The labeling configuration of a Label Studio project: its classes, and where its tasks keep the image."""

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
    """A control of choices about an image.

    Attributes:
        name: Its name, which results give as ``from_name``.
        image: Name of its image, which results give as ``to_name``.
        key: Key of the image in the data of a task.
        classes: What results say of each choice: its alias, or its value.
        prompts: What annotators read: the values.
        controls: Names of all controls of the project.
        multiple: Whether an answer may name several choices.
    """

    name: str
    image: str
    key: str
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    controls: frozenset[str]
    multiple: bool


def read_label_config(file: Path, control: str | None = None) -> Choices:
    """Reads the XML of a project's settings, "Labeling Interface", "Code".

    Args:
        file: The XML.
        control: Name of the control of choices; needed where there are several.

    Raises:
        DataError: The file is missing or is no XML; it has no choices about a whole image, or several and none is
            named; the choices are nested, or come from the data of each task.
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
            f"{file}: has no Choices about a whole Image, only {listed(map(brief, kinds)) or 'other tags'}; use a "
            "project whose images get choices"
        )
    if control is None and len(found) > 1:
        raise DataError(f"{file}: has several Choices: {listed(map(brief, found))}; say which with control")
    name = next(iter(found)) if control is None else control
    if name not in found:
        raise DataError(
            f"{file}: has no Choices {brief(name)} about an image{did_you_mean(name, found)}; it has "
            f"{listed(map(brief, found))}; correct control"
        )
    image = found[name].get("toName", "")
    key = images[image]
    if len(key) < 2 or key[0] != "$":
        raise DataError(
            f"{file}: Image {brief(image)} has value={brief(key)}, which is no key of a task such as $image"
        )
    classes, prompts = _choices(file, found[name])
    controls = frozenset(tag.get("name", "") for tag in root.iter() if tag.get("toName"))
    multiple = found[name].get("choice") == "multiple"
    return Choices(name, image, key[1:], classes, prompts, controls, multiple)


def _choices(file: Path, control: Element) -> tuple[tuple[str, ...], tuple[str, ...]]:
    where = f"{file}, Choices {brief(control.get('name'))}"
    choices = list(_tags(control, "Choice"))
    if not choices:
        raise DataError(
            f"{where}: lists no Choice; write its choices there, or leave label_config out and give class_file"
        )
    for choice in choices:
        if not choice.get("value"):
            raise DataError(f"{where}: a Choice has no value; name it")
        if len(list(_tags(choice, "Choice"))) > 1:
            raise DataError(f"{where}: choices within {brief(choice.get('value'))}; nested choices are not read")
    values = tuple(choice.get("value", "") for choice in choices)
    return tuple(choice.get("alias") or value for choice, value in zip(choices, values, strict=True)), values


def _tags(root: Element, name: str) -> Iterator[Element]:
    """Elements of a name in ``root`` and below, in any case, as Label Studio takes them."""
    return (tag for tag in root.iter() if tag.tag.lower() == name.lower())
