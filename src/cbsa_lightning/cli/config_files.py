"""Configuration files: found by name, checked before jsonargparse reads them, paths in them expanded."""

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

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # jsonargparse's, which takes a little less than the other


_PATH = re.compile(r"~(?=/|$)|\$(\w+|\{\w+\})(?=/|$)")  # at the start of a value


def shipped_configs() -> Path:
    """Folder of the configurations that come with the library; an editable install has them in its checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(name: str | os.PathLike[str]) -> Path:
    """Finds a configuration file: a path, or the name of one that comes with the library.

    Args:
        name: Such as ``mine.yaml``, ``methods/cbsa.yaml`` or ``configs/methods/cbsa.yaml``.

    Raises:
        ConfigError: If there is none; names similar ones.
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
    hint = f"Similar ones are {listed(similar)}" if similar else f"Those below {shipped} are found by name"
    raise ConfigError(f"{name}: there is no such configuration file. {hint}.")


def find_configs(words: Sequence[str]) -> list[str]:
    """Replaces the names after ``--config`` in a command line by the files that they mean; see :func:`find_config`."""
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
    """Replaces ``~`` or an environment variable with which a path begins.

    Raises:
        ConfigError: If the variable is not set.
    """
    if not (start := _PATH.match(value)):
        return value
    path = os.path.expanduser(os.path.expandvars(value))
    if path == value:
        raise ConfigError(f"{value}: {start.group()} is not set. Set it, or write the path out.")
    return path


def expand_paths(config: Any) -> Any:
    """Expands all values of a parsed configuration that begin like a path; see :func:`expanded`."""
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
    """Refuses files after ``--config`` that are no YAML mapping; what they set is not looked at.

    Raises:
        ConfigError: Naming the file, and the line of its mistake.
    """
    for file in _named(words):
        try:
            text = read_text(file)
            node = yaml.compose(text, Loader=_LOADER)
            events = list(yaml.parse(text, Loader=_LOADER))
        except FileNotFoundError:
            raise ConfigError(f"{file}: there is no such configuration file; correct the path.") from None
        except DataError as error:
            raise ConfigError(str(error)) from error
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{file}: cannot be read as YAML ({reason}); correct it, and save it as UTF-8."
            ) from error
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file}: must map settings to values, as in 'trainer: {{max_epochs: 2}}'.")
        if nul := [e.start_mark.line + 1 for e in events if "\0" in (getattr(e, "value", None) or "")]:
            raise ConfigError(f"{file}: line {nul[0]} has a NUL character, which no setting takes; remove it.")
        for event in events:
            if isinstance(event, yaml.ScalarEvent) and (new := current(event.value)) != event.value:
                raise ConfigError(
                    f"{file}, line {event.start_mark.line + 1}: {event.value} is now {new.rpartition('.')[2]}, without "
                    "its module; correct it."
                )


@contextmanager
def naming_files(words: Sequence[str]) -> Iterator[None]:
    """Adds to a refused setting the configuration files that mention it, unless a flag does.

    Raises:
        ConfigError: The refusal, with the files.
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
    """Yields what ``--config`` is given in a command line: names of files, or YAML itself."""
    return option_values(words, "--config", "-c")


def option_values(words: Sequence[str], *options: str) -> Iterator[str]:
    """Yields the values that one of ``options`` is given in a command line."""
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in options:
            yield value if equals else "".join(words[i + 1 : i + 2])


def _named(words: Sequence[str]) -> Iterator[Path]:
    return map(Path, filter(is_file_name, config_values(words)))


def is_file_name(value: str) -> bool:
    """Whether a value of ``--config`` names a file."""
    return bool(value) and "\n" not in value and ": " not in value  # jsonargparse takes YAML itself as well
