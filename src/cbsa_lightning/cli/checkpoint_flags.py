"""Combines the model settings of a checkpoint with command-line flags and configuration files.

Settings that the command line does not mention come from the checkpoint. Some settings may differ from the checkpoint.
A different value of any other setting raises an error, so that no flag is silently ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cbsa_lightning.checkpoints.files import MODEL
from cbsa_lightning.cli.config_files import config_values, is_file_name, option_values
from cbsa_lightning.cli.renamed import current
from cbsa_lightning.errors import CheckpointError, ConfigError

_FREE = ("clip", "pretrained", "network.clip", "network.pretrained", "unsup_weight", "max_skipped_steps", "optimizer")
"""Settings that may differ from the checkpoint: the location of CLIP's weights, which the fingerprint verifies, and
settings that each step reads. For the optimizer, this includes everything except its class."""

_TRAINING = ("optimizer", "scheduler", "loss", "labeler", "contexts", "warmup_epochs", "ema_decay", "unsup_weight")
"""Settings that only training reads; they have no effect on other commands."""


def settle(
    model: Mapping[str, Any], given: Collection[str], checkpoint: Mapping[str, Any], source: str, training: bool
) -> dict[str, Any] | None:
    """Merges the configuration of the model with that of a checkpoint.

    Args:
        model: Resolved ``class_path`` and ``init_args``, including defaults.
        given: Names of the settings in the command line and its configuration files; see :func:`mentioned`.
        checkpoint: The checkpoint.
        source: File of the checkpoint, for messages.
        training: Whether training resumes from the checkpoint.

    Returns:
        The configuration to use, or None if the checkpoint does not contain its settings.

    Raises:
        ConfigError: If a setting that must not differ has a different value; the message contains both values.
        CheckpointError: If the configuration in the checkpoint is damaged.
    """
    stored = _stored(model, checkpoint, source)
    if stored is None:
        return None
    here, there = dict(_leaves(model)), dict(_leaves(stored))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) == there.get(name) or not _is_given(name, given):
            continue
        if _is_free(name) or (not training and _below(name, _TRAINING)):
            continue
        raise ConfigError(
            f"--model.{name} is {here.get(name)!r}, but {source} was trained with {there.get(name)!r}. Remove this "
            "setting, or train a new model."
        )
    free = {name: value for name, value in here.items() if _is_free(name) and _is_given(name, given)}
    return _with(stored, free)


def mentioned(words: Sequence[str]) -> set[str]:
    """Returns the names of the model settings in a command line and its configuration files.

    Returns:
        Dotted names without ``model.`` and ``init_args.``, such as ``optimizer.lr``.
    """
    names: set[str] = set()
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--model."):
            names.add(_short(option.removeprefix("--model.").rstrip("+")))
    for value in option_values(words, "--model"):
        read = yaml.safe_load(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value)
        names.update(name for name, _ in _leaves(read if isinstance(read, dict) else {"class_path": read}))
    for value in config_values(words):
        read = yaml.safe_load(Path(value).read_text(encoding="utf-8") if is_file_name(value) else value)
        sections = [read, *(read.values() if isinstance(read, dict) else ())]  # also below a subcommand
        for section in sections:
            found = section.get("model") if isinstance(section, dict) else None
            names.update(name for name, _ in _leaves(found or {}))
    return names


def _stored(model: Mapping[str, Any], checkpoint: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Returns the configuration in the checkpoint; checkpoints written from Python have it in ``hyper_parameters``."""
    if (text := checkpoint.get(MODEL)) is not None:
        try:
            stored = current(yaml.safe_load(text))
        except (yaml.YAMLError, AttributeError) as error:
            raise CheckpointError(f"{source}: its {MODEL} cannot be read ({error}). Use another checkpoint.") from error
        if not isinstance(stored, dict) or not isinstance(stored.get("init_args") or {}, dict):
            raise CheckpointError(f"{source}: its {MODEL} is not a model configuration. Use another checkpoint.")
        return stored
    init = dict(model.get("init_args") or {})
    if "network" in init:
        return None  # the network is an object, and hyperparameters contain only plain values
    known = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if k in init}
    return {**model, "init_args": {**init, **known}}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name, without ``init_args``, and the value of each setting that is not a mapping."""
    if isinstance(value, Mapping) and (value or not name):
        for key, part in value.items():
            yield from _leaves(part, name if key == "init_args" else f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def _with(stored: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**stored, "init_args": dict(stored.get("init_args") or {})}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = changed["init_args"]
        for section in sections:
            place[section] = {**place[section], "init_args": dict(place[section]["init_args"])}
            place = place[section]["init_args"]
        place[last] = value
    return changed


def _short(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "init_args")


def _is_free(name: str) -> bool:
    return _below(name, _FREE) and name != "optimizer.class_path"


def _is_given(name: str, given: Collection[str]) -> bool:
    return _below(name, given) or any(other.startswith(f"{name}.") for other in given)


def _below(name: str, names: Collection[str]) -> bool:
    """Returns whether a setting is one of ``names`` or nested in one of them."""
    return any(name == other or name.startswith(f"{other}.") for other in names)
