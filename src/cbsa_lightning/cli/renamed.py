"""Replaces class paths of earlier versions in checkpoints and configurations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

MODULES = {
    "cbsa": "training.cbsa",
    "context_task": "method.context_task",
    "decisions": "method.decisions",
    "gain": "training.gain",
    "labelers": "method.labelers",
    "linear_probe": "method.linear_probe",
    "loggers": "training.loggers",
    "losses": "method.losses",
    "module": "training.module",
    "schedules": "training.schedules",
    "stacking": "method.stacking",
}
"""New path of each module that contains classes for configurations, by the name of the module in version 0.1."""


CLASSES = {"LabelledOnly": "LabeledOnly"}
"""New name of each renamed class, by its earlier name."""


def current(value: Any) -> Any:
    """Returns settings in which class paths of earlier versions are replaced with those of this version.

    Args:
        value: A setting, or a nested structure of mappings and lists of settings.
    """
    if isinstance(value, dict):
        return {name: current(part) for name, part in value.items()}
    if isinstance(value, list):
        return [current(part) for part in value]
    if isinstance(value, str) and value.startswith("cbsa_lightning."):
        module, _, name = value.removeprefix("cbsa_lightning.").rpartition(".")
        return f"cbsa_lightning.{MODULES[module]}.{CLASSES.get(name, name)}" if module in MODULES else value
    return value


def current_words(words: Sequence[str]) -> list[str]:
    """Returns the command line with the option names and class paths of this version, and prints replaced options."""
    found = []
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("--") and "labelled" in option:
            print(f"{option} is now {option.replace('labelled', 'labeled')}.", file=sys.stderr)
            option = option.replace("labelled", "labeled")
        found.append(f"{option}{equals}{current(value)}" if option.startswith("--") else current(word))
    return found
