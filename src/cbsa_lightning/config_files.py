"""Configuration files, looked at before jsonargparse does, which does not say which of several it means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from cbsa_lightning.data.reading import read_text
from cbsa_lightning.errors import ConfigError, DataError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # jsonargparse's, which takes a little less than the other


def check_configs(words: Sequence[str]) -> None:
    """Refuses files after ``--config`` that are no YAML mapping; what they set is not looked at.

    Raises:
        ConfigError: Naming the file, and the line of its mistake.
    """
    for file in _named(words):
        try:
            node = yaml.compose(read_text(file), Loader=_LOADER)
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


def _named(words: Sequence[str]) -> Iterator[Path]:
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            value = value if equals else "".join(words[i + 1 : i + 2])
            if value and "\n" not in value and ": " not in value:  # jsonargparse takes YAML itself as well
                yield Path(value)
