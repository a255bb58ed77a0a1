"""Command-line parser that reports errors as one sentence with suggestions."""

from __future__ import annotations

import difflib
import pydoc
import re
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from cbsa_lightning.arguments import constructor_arguments
from cbsa_lightning.errors import CBSAError, ConfigError, causes, listed

# Without this, callbacks with an enum as default, such as Lightning's Timer, cannot be saved in config.yaml.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))

_STRUCTURE = ("Parser key", "Does not validate", "Subtypes", "Errors", "Given value", "Problem with given class_path")


class PlainParser(LightningArgumentParser):
    """LightningCLI's parser without abbreviated options, which reports each error as one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises an error about the command line.

        Raises:
            ConfigError: Always; the message contains the setting, the reason and similar names.
        """
        if not self.exit_on_error:  # a nested parser of jsonargparse
            super().error(message, ex)
        raise ConfigError(self._sentence(message)) from None

    def _sentence(self, message: str) -> str:
        if unknown := re.match(r"[Uu]nrecognized arguments: (\S+)", message):
            option = unknown.group(1).partition("=")[0]
            return f"{option} is not an option.{_similar(option, list(self._option_string_actions))}"
        if unknown := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message):  # from a file
            return f"--{unknown.group(1)} is not an option."
        keys = [key.removeprefix("--") for key in re.findall(r'Parser key "([^"]+)"', message)]
        setting = f"--{'.'.join(keys)}" if keys else "The command line"
        given = re.findall(r"(?:Given value|Got value): (.*)", message)
        if name := re.search(r"Expected a dot import path string: (\S+)", message):
            return (
                f"{setting}: there is no suitable class {name.group(1)!r}. Use a full name like package.module.Class."
            )
        if option := re.search(r"Option '([^']+)' is not accepted", message):
            return (
                f"{setting} has no setting {option.group(1)!r}.{_similar(option.group(1), _settings_named_in(message))}"
            )
        reasons = [line.strip().removeprefix("- ").rstrip(".") for line in message.splitlines()]
        reasons = [reason for reason in reasons if reason and not reason.startswith(_STRUCTURE)]
        if specific := [reason for reason in reasons if not reason.startswith("Expected a")]:
            return f"{setting}: {'; '.join(dict.fromkeys(specific))}."
        value = given[0] if given else "of another type"
        return f"{setting} is {value:.80}; it must be {' or '.join(_types(reasons))}."


def _types(reasons: list[str]) -> list[str]:
    """Returns the types in messages such as "Expected a <class 'int'>. Got value: x" as readable text."""
    found = [re.match(r"Expected an? (.*?)(?:\. Got value.*)?$", reason) for reason in reasons]
    names = [re.sub(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]", r"\1\2", kind.group(1)) for kind in found if kind]
    return [name for name in dict.fromkeys(names) if name != "NoneType"]


def _settings_named_in(message: str) -> list[str]:
    """Returns the names of the arguments of the class that the message refers to."""
    owner = re.findall(r"given class_path '([^']+)'", message)
    found: Any = pydoc.locate(owner[-1]) if owner else None
    try:
        return constructor_arguments(found)
    except (TypeError, ValueError):  # the class is not found, or is implemented in C and has no signature
        return []


def plain_cause(error: BaseException) -> CBSAError | None:
    """Returns the error to display for an error that was raised while building objects from the configuration.

    Returns:
        An error of this library, or a :class:`ConfigError` if a setting caused an error in another library. None for
        all other errors, which may be bugs and therefore keep their traceback.
    """
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, CBSAError):
            return cause
    for cause in chain:
        if isinstance(cause, (MisconfigurationException, ImportError)) or _raised_by_lightning(cause):
            return ConfigError(" ".join(str(cause).split()))
    return None


def _raised_by_lightning(error: BaseException) -> bool:
    place = error.__traceback__
    if place is None or not isinstance(error, (ValueError, TypeError)):
        return False
    while place.tb_next is not None:
        place = place.tb_next
    return Path(place.tb_frame.f_code.co_filename).is_relative_to(Path(lightning.__file__).parent)


def _similar(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names)
    return f" Similar names: {listed(found)}." if found else ""
