"""Finds the classes of a configuration by their full path. Classes of this library can also be found by name.

jsonargparse finds a class by name only if its module has been imported, so this file imports all modules with classes.
"""

from __future__ import annotations

import pydoc
from types import ModuleType
from typing import Any

from cbsa_lightning.data import augmentations, readers
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method import context_task, decisions, labelers, linear_probe, losses, stacking
from cbsa_lightning.networks import (
    dsrb,
    dualcoop,
    dualcoop_plus,
    gcn_ml,
    hst,
    resnet,
    sarb,
    scpnet,
    ssgrl,
    sst,
    tai,
    word_vectors,
    zero_shot,
)
from cbsa_lightning.training import cbsa, loggers, module, schedules

_MODULES: tuple[ModuleType, ...] = (
    *(cbsa, module, labelers, context_task, stacking, linear_probe, losses, decisions, loggers, readers, augmentations),
    *(dualcoop, dualcoop_plus, resnet, scpnet, tai, zero_shot),
    *(ssgrl, gcn_ml, sst, sarb, hst, dsrb, word_vectors, schedules),
)


def class_named(name: str) -> Any:
    """Returns the class with the given name or path.

    Args:
        name: For example, ``DualCoOp`` or ``my_package.MyNetwork``.

    Raises:
        ConfigError: If there is no such class.
    """
    if "." not in name:
        found: Any = next((vars(place)[name] for place in _MODULES if name in vars(place)), None)
    else:
        try:
            found = pydoc.locate(name)
        except pydoc.ErrorDuringImport as error:
            raise ConfigError(f"{name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"There is no class {name}. Check its name, and make sure that its module is on PYTHONPATH.")
    return found
