"""Parameter names of networks that ``torch.compile`` has wrapped."""

from __future__ import annotations


def plain_name(name: str) -> str:
    """Removes the prefix that ``torch.compile(module)`` adds, so that compiled and plain networks share names."""
    return name.replace("_orig_mod.", "")
