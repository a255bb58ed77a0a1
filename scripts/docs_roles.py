"""Griffe extension that converts cross-references in docstrings, such as :class:`Network`, to links of the site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`(?:(?P<text>[^`<]+?) <)?(?P<short>~?)\.?(?P<name>[\w.]+)>?`")


class Roles(Extension):
    """Replaces each role with a link. If the site does not document the object, only its name is shown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: linked(role, obj), obj.docstring.value)


def linked(role: re.Match[str], obj: Object) -> str:
    """Returns the link of a role, in the syntax of mkdocs-autorefs."""
    name = role["name"]
    text = role["text"] or f"<code>{name.rpartition('.')[2] if role['short'] else name}</code>"
    first, dot, rest = name.partition(".")
    target = name
    if first != "cbsa_lightning":
        try:
            target = obj.resolve(first) + dot + rest
        except NameResolutionError:
            return text
    return f'<autoref identifier="{target}" optional>{text}</autoref>'
