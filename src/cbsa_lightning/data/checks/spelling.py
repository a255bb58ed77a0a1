"""Detection of class names that may be different spellings of the same class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

_SHORTEST = 5  # minimum length of names that may differ in one letter; "cat" and "car" are different words


def similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Finds pairs of names that differ only in case, white space or punctuation, or by one letter.

    An additional letter, as in a plural, is allowed for names of at least three letters. A different letter, or two
    swapped neighbors, are allowed for names of at least five letters. Names with different digits, such as "class 1"
    and "class 2", are never similar.

    Args:
        names: The C class names. The time is linear in C.

    Returns:
        Pairs in the order of ``names``.
    """
    plain = ["".join(mark for mark in name.casefold() if mark.isalnum()) for name in names]
    places: dict[str, list[int]] = defaultdict(list)
    for k, text in enumerate(plain):
        for part in {text, *_one_shorter(text)}:
            places[part].append(k)
    pairs = {
        (i, j)
        for group in places.values()
        for n, j in enumerate(group)
        for i in group[:n]
        if _alike(plain[i], plain[j])
    }
    return [(names[i], names[j]) for i, j in sorted(pairs)]


def _one_shorter(text: str) -> Iterator[str]:
    return (text[:k] + text[k + 1 :] for k in range(len(text)) if not text[k].isdigit())


def _alike(first: str, second: str) -> bool:
    """Returns whether two texts with a common result of :func:`_one_shorter` differ by at most one edit."""
    if first == second:
        return bool(first)
    shorter, longer = sorted((first, second), key=len)
    if len(shorter) < len(longer):
        return len(shorter) >= 3 and shorter in _one_shorter(longer)
    differing = [k for k in range(len(first)) if first[k] != second[k]]
    if len(first) < _SHORTEST or any(text[k].isdigit() for text in (first, second) for k in differing):
        return False
    exchanged = len(differing) == 2 and [first[k] for k in differing] == [second[k] for k in reversed(differing)]
    return len(differing) == 1 or (exchanged and differing[1] == differing[0] + 1)
