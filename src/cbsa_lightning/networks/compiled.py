"""Names of networks that may be wrapped by ``torch.compile``, and of their parameters."""

from __future__ import annotations

from typing import Any


def plain_name(name: str) -> str:
    """Removes the prefix that ``torch.compile(module)`` adds to the names of parameters."""
    return name.replace("_orig_mod.", "")


def class_of(network: Any) -> str:
    """Returns the class name of a network, which may be compiled."""
    return type(getattr(network, "_orig_mod", network)).__name__
