"""Reads configurations from YAML as plain mappings, and merges them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from cbsa_lightning.errors import ConfigError

Settings = dict[str, Any]


def read(file: Path) -> Settings:
    """Reads an overlay.

    Raises:
        ConfigError: If the file does not exist or is not a mapping.
    """
    if not file.is_file():
        raise ConfigError(
            f"The overlay {file} does not exist. Correct its name, or set the folder of overlays with --configs."
        )
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} must be a mapping such as 'trainer: {{max_epochs: 40}}', not {found!r}.")
    return found


def merged(overlays: Iterable[Settings]) -> Settings:
    """Merges overlays from left to right, as the command line merges ``--config`` files.

    There is one difference. If an overlay selects another class, this function drops the arguments of the previous
    class, whereas the command line keeps those that the new class also has.
    """
    return reduce(_over, overlays, {})


def _over(below: Settings, above: Settings) -> Settings:
    """Merges ``above`` over ``below``; if the class differs, its earlier arguments are dropped."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, dict) and set(value) == {"init_args"}:
            old = {"class_path": old}  # the class is given only by its path
        if isinstance(old, dict) and "class_path" in old and _same_class(value, old["class_path"]):
            continue  # the same class is given only by its path, so it keeps its arguments
        if isinstance(old, dict) and isinstance(value, dict) and not _other_class(old, value):
            result[key] = _over(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _other_class(old: Settings, new: Settings) -> bool:
    return "class_path" in new and not _same_class(old.get("class_path"), new["class_path"])


def _same_class(one: Any, other: Any) -> bool:
    """Returns whether two class paths refer to the same class; either may be only a name."""
    if isinstance(one, str) and isinstance(other, str) and not ("." in one and "." in other):
        return one.rpartition(".")[2] == other.rpartition(".")[2]
    return bool(one == other)
