"""Checks of constructor arguments: a wrong one is refused by name, where it was given."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from cbsa_lightning.errors import ConfigError, listed


def check_names(name: str, values: Any, count: int | None = None) -> list[str]:
    """Class or prompt names as a list.

    Args:
        name: Of the argument.
        values: Any iterable of texts but a text itself.
        count: How many there must be; None: one or more.

    Raises:
        ConfigError: They are no texts, are empty or repeated, or another number.
    """
    try:
        names = None if isinstance(values, (str, bytes)) else list(values)
    except TypeError:
        names = None
    if names is None or not all(isinstance(value, str) for value in names):
        raise ConfigError(f"{name} must be a list of texts, got {values!r:.100}.")
    if not names:
        raise ConfigError(f"{name} is empty; give one or more.")
    if blank := [k for k, value in enumerate(names) if not value.strip()]:
        raise ConfigError(f"{name}: number {listed(blank)} is empty; name it.")
    if repeated := sorted({value for value in names if names.count(value) > 1} if count is None else ()):
        raise ConfigError(f"{name} has {listed(map(repr, repeated))} more than once; keep one of each.")
    if count is not None and len(names) != count:
        raise ConfigError(f"{name} has {len(names)} entries for {count} classes; give one for each.")
    return names


def check_number(
    name: str, value: Any, least: float | None = None, most: float | None = None, *, whole: bool = False
) -> None:
    """Refuses what is no finite number, or outside of its bounds.

    Raises:
        ConfigError: Naming the argument, its bounds and its value.
    """
    number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if whole:
        number = number and isinstance(value, Integral)
    inside = number and (least is None or value >= least) and (most is None or value <= most)
    if not inside:
        kind = "an integer" if whole else "a number"
        bounds = [f"{word} {bound}" for word, bound in (("at least", least), ("at most", most)) if bound is not None]
        raise ConfigError(f"{name} must be {kind}{' of ' if bounds else ''}{' and '.join(bounds)}, got {value!r:.100}.")


def check_kind(name: str, value: Any, kinds: type | Sequence[type], remedy: str) -> None:
    """Refuses an object of another class; None passes.

    Raises:
        ConfigError: Naming the argument, the class of the value, and what to give.
    """
    kinds = (kinds,) if isinstance(kinds, type) else tuple(kinds)
    if value is not None and not isinstance(value, kinds):
        raise ConfigError(f"{name} cannot be a {type(value).__name__} ({value!r:.60}); give {remedy}.")


def check_flags(**flags: Any) -> None:
    """Refuses what is neither True nor False: the text "false" would count as True.

    Raises:
        ConfigError: Naming the argument and its value.
    """
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ConfigError(f"{name} must be True or False, got {value!r:.100}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses what is none of the choices.

    Raises:
        ConfigError: Naming the argument, its choices and its value.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r:.100}.")


def check_paths(**paths: Any) -> None:
    """Refuses what is no path; None passes.

    Raises:
        ConfigError: Naming the argument and its value.
    """
    for name, value in paths.items():
        check_kind(name, value, (str, os.PathLike), "a path")
