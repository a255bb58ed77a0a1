"""Words in a labels cell that are not class names, but mean "not labeled" or "shows no class"."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from cbsa_lightning.data.class_names import clean_name

NO_LABEL = "none"
UNLABELED = frozenset({"", "nan", "na", "n/a", "null", "-", "unlabeled", "unlabelled", "<na>", "#n/a"})
_LIKE_NOTHING = re.compile(
    r"none|nothing|(no|without)( any)? (findings?|labels?|class(es)?|tags?|objects?|annotations?|categor(y|ies))"
    r"|none of (the above|these)"
)
_QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
_SIGNS = re.compile(r"[\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e\s]+")


def begins_a_list(text: str) -> bool:
    """Returns whether ``text`` begins like a list in JSON or Python, or an object in JSON."""
    return text[:1] in ("[", "{")


class Meaning(Enum):
    """Meaning of a word in a labels cell."""

    UNLABELED = "not labeled"
    NOTHING = "shows no class"
    UNCLEAR = "does not look like a class"
    NAME = "a class"


@dataclass(frozen=True)
class Words:
    """Distinguishes class names from words with another meaning.

    ``none`` and the words in ``nothing`` mean that an image shows no class. Empty cells, Python's ``None``, and
    ``nan``, ``NA``, ``N/A``, ``NULL``, ``-``, ``unlabeled`` or ``unlabelled`` (case-insensitive) mean that an image is
    not labeled. Words that only resemble these, such as "No Finding" or "?", are unclear, as are parts of lists and
    names in quotes.

    Attributes:
        nothing: Words specified by the user that mean that an image shows no class.
        classes: Names in a class file. They are always classes.
    """

    nothing: frozenset[str] = frozenset()
    classes: Collection[str] = ()

    def meaning(self, word: str) -> Meaning:
        """Returns the meaning of ``word``, which is a cell or one of the names in a cell."""
        word = clean_name(word)
        folded = word.casefold()
        if word == NO_LABEL or word in self.nothing:
            return Meaning.NOTHING
        if word and word in self.classes:
            return Meaning.NAME
        if word == "None" or folded in UNLABELED:
            return Meaning.UNLABELED
        plain = re.sub(r"[\s_-]+", " ", folded)
        if _LIKE_NOTHING.fullmatch(plain) or begins_a_list(word) or _SIGNS.fullmatch(word) or _QUOTED.fullmatch(word):
            return Meaning.UNCLEAR
        return Meaning.NAME
