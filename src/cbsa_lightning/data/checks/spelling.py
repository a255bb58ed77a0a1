"""Finds class names that may be two spellings of one class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

_SHORTEST = 5  # minimum length of names that differ in one letter; "cat" and "car" are different words


def similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Finds pairs of names that differ in case, white space or punctuation, or by one letter.

    An additional letter, such as a plural, counts from three letters on. A different letter, or two swapped neighbors,
    counts from five letters on. Different digits never count: "class 1" and "class 2" are two classes.

    Args:
        names: C names; the time is linear in C.

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
    """Returns whether two texts that share a part of :func:`_one_shorter` are equal or one edit apart."""
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
