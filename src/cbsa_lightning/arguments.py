"""Checks of constructor arguments. Each error message names the argument."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from cbsa_lightning.errors import ConfigError, listed


def check_names(name: str, values: Any, count: int | None = None) -> list[str]:
    """Returns class or prompt names as a list.

    Args:
        name: Name of the argument.
        values: Any iterable of strings except a single string.
        count: Required number of names; None requires at least one.

    Raises:
        ConfigError: If a value is not a string, is empty or repeated, or if the number of values is wrong.
    """
    try:
        names = None if isinstance(values, (str, bytes)) else list(values)
    except TypeError:
        names = None
    if names is None or not all(isinstance(value, str) for value in names):
        raise ConfigError(f"{name} must be a list of strings, got {values!r:.100}.")
    if not names:
        raise ConfigError(f"{name} is empty; give at least one.")
    if blank := [k for k, value in enumerate(names) if not value.strip()]:
        raise ConfigError(f"{name}: number {listed(blank)} is empty; enter a name.")
    if repeated := sorted({value for value in names if names.count(value) > 1} if count is None else ()):
        raise ConfigError(f"{name} contains {listed(map(repr, repeated))} more than once; remove the duplicates.")
    if count is not None and len(names) != count:
        raise ConfigError(f"{name} has {len(names)} entries for {count} classes; specify one per class.")
    return names


def check_number(
    name: str, value: Any, least: float | None = None, most: float | None = None, *, whole: bool = False
) -> None:
    """Checks that a value is a finite number within its bounds.

    Raises:
        ConfigError: If the value is not such a number. The message names the argument, its bounds and its value.
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
    """Checks that an object is an instance of one of ``kinds``. None is allowed.

    Raises:
        ConfigError: If the class is wrong. The message names the argument, its value and a valid alternative.
    """
    kinds = (kinds,) if isinstance(kinds, type) else tuple(kinds)
    if value is not None and not isinstance(value, kinds):
        raise ConfigError(f"{name} cannot be a {type(value).__name__} ({value!r:.60}); give {remedy}.")


def check_flags(**flags: Any) -> None:
    """Checks that values are bools. Other values could be misleading; for example, the string "false" is truthy.

    Raises:
        ConfigError: If a value is not a bool. The message names the argument and its value.
    """
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ConfigError(f"{name} must be True or False, got {value!r:.100}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks that a value is one of the choices.

    Raises:
        ConfigError: If it is none of them. The message names the argument, its choices and its value.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r:.100}.")


def check_paths(**paths: Any) -> None:
    """Checks that values are paths. None is allowed.

    Raises:
        ConfigError: If a value is not a path. The message names the argument and its value.
    """
    for name, value in paths.items():
        check_kind(name, value, (str, os.PathLike), "a path")


def constructor_arguments(kind: Any) -> list[str]:
    """Returns the names of the arguments of a class or function.

    If a constructor has ``**settings``, the arguments of its base class are included, unless the class
    defines its own signature.

    Raises:
        TypeError: If ``kind`` cannot be called.
        ValueError: If ``kind`` is written in C and has no signature.
    """
    parameters = inspect.signature(kind).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if len(names) < len(parameters) and isinstance(kind, type):
        names += [name for name in constructor_arguments(kind.__base__) if name not in names]
    return names
