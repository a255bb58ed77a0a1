"""Finds configuration files by name, checks them before jsonargparse reads them, and expands paths in them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from cbsa_lightning.cli.renamed import current
from cbsa_lightning.errors import ConfigError, DataError, listed
from cbsa_lightning.io.reading import read_text

# jsonargparse also uses the C loader, which accepts slightly less than SafeLoader.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_PATH = re.compile(r"~(?=/|$)|\$(\w+|\{\w+\})(?=/|$)")  # at the start of a value


def shipped_configs() -> Path:
    """Returns the folder of the library's configurations, in the package or in the checkout of an editable install."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(name: str | os.PathLike[str]) -> Path:
    """Finds a configuration file by its path or, for a configuration of the library, by its name.

    Args:
        name: For example, ``mine.yaml``, ``methods/cbsa.yaml`` or ``configs/methods/cbsa.yaml``.

    Raises:
        ConfigError: If there is no such file; the message suggests similar names.
    """
    file = Path(expanded(os.fspath(name)))
    shipped = shipped_configs()
    inside = shipped.joinpath(*file.parts[1:] if file.parts[:1] == ("configs",) else file.parts)
    if os.path.lexists(file) and not file.is_dir():
        return file
    if inside.is_file():
        return inside
    names = sorted(path.relative_to(shipped).as_posix() for path in shipped.rglob("*.yaml"))
    similar = difflib.get_close_matches(file.as_posix().removeprefix("configs/"), names)
    hint = f"Similar names are {listed(similar)}" if similar else f"Files below {shipped} can be found by name"
    raise ConfigError(f"{name}: configuration file not found. {hint}.")


def find_configs(words: Sequence[str]) -> list[str]:
    """Replaces the names after ``--config`` in a command line with file paths; see :func:`find_config`."""
    found = list(words)
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        if equals and is_file_name(value):
            found[i] = f"{option}={find_config(value)}"
        elif not equals and i + 1 < len(words) and is_file_name(words[i + 1]):
            found[i + 1] = str(find_config(words[i + 1]))
    return found


def expanded(value: str) -> str:
    """Expands ``~`` or an environment variable at the start of a path.

    Raises:
        ConfigError: If the variable is not set.
    """
    if not (start := _PATH.match(value)):
        return value
    path = os.path.expanduser(os.path.expandvars(value))
    if path == value:
        raise ConfigError(f"{value}: {start.group()} is not set. Set it, or use the full path.")
    return path


def expand_paths(config: Any) -> Any:
    """Expands all values of a parsed configuration that start with ``~`` or a variable; see :func:`expanded`."""
    if isinstance(config, str):
        return expanded(config)
    if isinstance(config, Namespace):
        for name, value in vars(config).items():
            setattr(config, name, expand_paths(value))
    if isinstance(config, dict):
        return {name: expand_paths(value) for name, value in config.items()}
    if isinstance(config, list):
        return [expand_paths(value) for value in config]
    return config


def check_configs(words: Sequence[str]) -> None:
    """Checks that the files after ``--config`` are YAML mappings, but does not check the settings in them.

    Raises:
        ConfigError: If a file is not a YAML mapping; the message names the file and the line.
    """
    for file in _named(words):
        try:
            text = read_text(file)
            node = yaml.compose(text, Loader=_LOADER)
            events = list(yaml.parse(text, Loader=_LOADER))
        except FileNotFoundError:
            raise ConfigError(f"{file}: configuration file not found; correct the path.") from None
        except DataError as error:
            raise ConfigError(str(error)) from error
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{file} cannot be read as YAML ({reason}); correct the file, and save it as UTF-8."
            ) from error
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file} must contain a mapping such as 'trainer: {{max_epochs: 2}}'.")
        if nul := [e.start_mark.line + 1 for e in events if "\0" in (getattr(e, "value", None) or "")]:
            raise ConfigError(f"{file}: line {nul[0]} has a NUL character, which is not allowed; remove it.")
        for event in events:
            if isinstance(event, yaml.ScalarEvent) and (new := current(event.value)) != event.value:
                raise ConfigError(
                    f"{file}, line {event.start_mark.line + 1}: replace {event.value} with {new.rpartition('.')[2]}, "
                    "without the module."
                )


@contextmanager
def naming_files(words: Sequence[str]) -> Iterator[None]:
    """Adds the configuration files that mention a rejected setting to the error, unless a flag sets this setting.

    Raises:
        ConfigError: The original error with the names of the files.
    """
    try:
        yield
    except ConfigError as error:
        named = re.search(r"'([^']+)'|--(?:\w+\.)*(\w+)", str(error))
        name = (named.group(1) or named.group(2)).split(".")[-1] if named else ""
        files = list(_named(words))
        flags = [word for word in words[1:] if word.startswith("--") and not word.startswith("--config")]
        if not files or any(name in flag for flag in flags):
            raise
        mentioning = [file for file in files if name in read_text(file)] or files
        raise ConfigError(f"{listed(map(str, mentioning))}: {error}") from None


def config_values(words: Sequence[str]) -> Iterator[str]:
    """Yields the values of ``--config`` in a command line, which are file names or YAML text."""
    return option_values(words, "--config", "-c")


def option_values(words: Sequence[str], *options: str) -> Iterator[str]:
    """Yields the values of ``options`` in a command line."""
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in options:
            yield value if equals else "".join(words[i + 1 : i + 2])


def _named(words: Sequence[str]) -> Iterator[Path]:
    return map(Path, filter(is_file_name, config_values(words)))


def is_file_name(value: str) -> bool:
    """Returns whether a value of ``--config`` is a file name."""
    return bool(value) and "\n" not in value and ": " not in value  # jsonargparse also accepts YAML text
