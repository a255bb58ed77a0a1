"""Classes that a configuration names: by their full path, or, for those of this library, by their name alone.

jsonargparse finds a class by its name alone once its module is imported, so this module imports them.
"""

from __future__ import annotations

import pydoc
from types import ModuleType
from typing import Any

from cbsa_lightning.data import augmentations, readers
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method import context_task, decisions, labelers, linear_probe, losses, stacking
from cbsa_lightning.networks import dualcoop, dualcoop_plus, resnet, scpnet, tai, zero_shot
from cbsa_lightning.training import cbsa, loggers, module

_MODULES: tuple[ModuleType, ...] = (
    *(cbsa, module, labelers, context_task, stacking, linear_probe, losses, decisions, loggers, readers, augmentations),
    *(dualcoop, dualcoop_plus, resnet, scpnet, tai, zero_shot),
)


def class_named(name: str) -> Any:
    """The class that a configuration means.

    Args:
        name: Such as ``DualCoOp`` or ``my_package.MyNetwork``.

    Raises:
        ConfigError: There is none.
    """
    if "." not in name:
        found: Any = next((vars(place)[name] for place in _MODULES if name in vars(place)), None)
    else:
        try:
            found = pydoc.locate(name)
        except pydoc.ErrorDuringImport as error:
            raise ConfigError(f"{name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"There is no class {name}; is its module on PYTHONPATH?")
    return found
