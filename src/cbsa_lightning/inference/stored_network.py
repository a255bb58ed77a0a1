"""Builds the network of a checkpoint written by `cbsa fit` from the configuration in the checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from cbsa_lightning.checkpoints.files import MODEL, SOURCE
from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.networks.base import Network

_OURS = "cbsa_lightning.networks."  # no other module is imported, so a file cannot choose which code runs


def stored_network(checkpoint: Mapping[str, Any], **changed: Any) -> Callable[[Sequence[str]], Network]:
    """Returns a function that builds the network of a checkpoint from prompt names.

    Args:
        checkpoint: Result of :func:`~cbsa_lightning.checkpoints.files.read_checkpoint`.
        **changed: Settings of the network that replace the stored ones.

    Raises:
        CheckpointError: If the checkpoint does not name its network, or the network is from another package.
    """
    source = checkpoint[SOURCE]
    try:
        network = yaml.safe_load(checkpoint[MODEL])["init_args"]["network"]
        path, settings = network["class_path"], dict(network.get("init_args") or {})
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{source} does not name its network. Specify how to build it: Classifier.load(path, network=...)."
        ) from error
    built = {name: _object(value, source) for name, value in settings.items()}
    make: Callable[[Sequence[str]], Network] = partial(_class(path, source), **{**built, **changed})
    return make


def _object(value: Any, source: Any) -> Any:
    """Converts a setting. A class of this library, with or without arguments, becomes a function that builds it."""
    if isinstance(value, dict) and "class_path" in value:
        return partial(_class(value["class_path"], source), **(value.get("init_args") or {}))
    return _class(value, source) if isinstance(value, str) and value.startswith(_OURS) else value


def _class(path: Any, source: Any) -> Any:
    module, _, name = str(path).rpartition(".")
    if module.startswith(_OURS):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, type):
            return found
    raise CheckpointError(
        f"{source} has the network {path!s:.200}, which is not a network of this library. Specify how to build it: "
        "Classifier.load(path, network=...)."
    )
