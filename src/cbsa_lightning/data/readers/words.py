"""Words in a labels cell that are no class: "not labelled", and "seen, shows nothing"."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from cbsa_lightning.data.class_names import clean_name

NO_LABEL = "none"
UNLABELLED = frozenset({"", "nan", "na", "n/a", "null", "-", "unlabelled", "unlabeled", "<na>", "#n/a"})
_LIKE_NOTHING = re.compile(
    r"none|nothing|(no|without)( any)? (findings?|labels?|class(es)?|tags?|objects?|annotations?|categor(y|ies))"
    r"|none of (the above|these)"
)
_SIGNS = re.compile(r"[\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e\s]+")


class Meaning(Enum):
    """What a word in a labels cell says of the image."""

    UNLABELLED = "not labelled"
    NOTHING = "shows no class"
    UNCLEAR = "no class by its looks"
    NAME = "a class"


@dataclass(frozen=True)
class Words:
    """Tells names of classes from words with another meaning.

    ``none`` and the words in ``nothing`` mean that an image shows no class. Empty, ``nan``, ``NA``, ``N/A``, ``NULL``,
    ``-``, ``unlabelled`` in any case, and ``None`` as Python writes it, mean that it is not labelled. What only looks
    like such a word, such as "No Finding" or "?", is unclear.

    Attributes:
        nothing: Words of the user that mean that an image shows no class.
        classes: Names of a class file, which are classes whatever they look like.
    """

    nothing: frozenset[str] = frozenset()
    classes: Collection[str] = ()

    def meaning(self, word: str) -> Meaning:
        """What ``word``, a cell or one of its names, says."""
        word = clean_name(word)
        folded = word.casefold()
        if word == NO_LABEL or word in self.nothing or folded.replace(" ", "") == "[]":
            return Meaning.NOTHING
        if word and word in self.classes:
            return Meaning.NAME
        if word == "None" or folded in UNLABELLED:
            return Meaning.UNLABELLED
        plain = re.sub(r"[\s_-]+", " ", folded)
        if _LIKE_NOTHING.fullmatch(plain) or word[0] in "[{" or _SIGNS.fullmatch(word):
            return Meaning.UNCLEAR
        return Meaning.NAME
