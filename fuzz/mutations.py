"""Damage: to bytes, to text, and to trees of the kind that JSON and YAML hold."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator

ODD_TEXTS = (
    "", " ", "\t", "\n", "\r\n", "a\nb", "\0", "a\0b", "\ud800", "\udcff.jpg", "\ufeff", "\u200b", "\u2028", "\x85",
    "\x1c", "\x0b", "\u202e", "é", "e\u0301", "İ", "ß", "ﬁ", "𝒳", "🏳️‍🌈", "none", "None", "nan", "null", "true", "image",
    "labels", "path", "_", "__", "a" * 300, "x" * 20_000, ";", ",", '"', "'", '"a', 'a"b', "a;b", "a,b", "%s", "{}",
    "{0}", "\\", "/", ".", "..", "../x.jpg", "..\\x.jpg", "/etc/passwd", "C:\\x.jpg", "\\\\server\\x.jpg", "a//b.jpg",
    "./a.jpg", "a/", "a/../b.jpg", "%2e%2e/x.jpg", "file:///x.jpg", "~", "=1+1", "-1", "1", "0", "2", "1.0", "1e400",
    "\x1b[31m", "日本", "Ω", "Å", "\u212b", " a ", "a\u00a0",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, -1, 2, 7, 0.5, 1.0, -0.0, 1e-9, 1e308, float("nan"), float("inf"), -float("inf"), 255, 256, 2**31, -(2**31),
    2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30,
)  # fmt: skip
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift-jis", "utf-7")


def pick(rng: Rng, items: Any) -> Any:
    """One of ``items``, as it is; ``rng.choice`` would make arrays of them."""
    return items[int(rng.integers(len(items)))]


def odd_text(rng: Rng) -> str:
    """A text that something may stumble over."""
    if rng.random() < 0.7:
        return str(pick(rng, ODD_TEXTS))
    points = rng.integers(1, pick(rng, (128, 0x250, 0x3000, 0x11_0000)), int(rng.integers(1, 12)))
    return "".join(map(chr, points.tolist()))


def odd_value(rng: Rng) -> Any:
    """A value that does not belong where it is put."""
    kind = rng.integers(6)
    if kind == 0:
        return pick(rng, (None, True, False))
    if kind in (1, 2):
        return pick(rng, ODD_NUMBERS)
    if kind in (3, 4):
        return odd_text(rng)
    return copy.deepcopy(pick(rng, ([], {}, [[]], [None], {"a": 1}, [1, 2], {"": ""}, ["a"])))


def damage_bytes(rng: Rng, content: bytes, most: int = 6) -> bytes:
    """``content`` with some bytes changed, and perhaps parts moved, doubled, taken out or cut off."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, most + 1))):
        size = len(data)
        at = int(rng.integers(size + 1))
        length = int(rng.integers(1, 1 + pick(rng, (1, 4, 16, 256))))
        kind = rng.integers(9)
        if kind == 0 and size:
            data[at % size] ^= 1 << int(rng.integers(8))
        elif kind == 1 and size:
            data[at % size] = pick(rng, (0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x0A))
        elif kind == 2 and size:
            data[at % size] = int(rng.integers(256))
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = rng.bytes(length)
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6:
            form = pick(rng, ("<H", ">H", "<I", ">I"))
            value = int(pick(rng, (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)))
            packed = struct.pack(form, value % (1 << 8 * struct.calcsize(form)))
            data[at : at + len(packed)] = packed
        elif kind == 7:
            other = int(rng.integers(size + 1))
            data[at:at] = data[other : other + length]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def damage_text(rng: Rng, text: str) -> str:
    """``text`` with an odd one put into it, or with one of its lines doubled, taken out, or in another place."""
    kind = rng.integers(4)
    at = int(rng.integers(len(text) + 1))
    if kind == 0:
        return text[:at] + odd_text(rng) + text[at + int(rng.integers(4)) :]
    lines = text.split("\n")
    k = int(rng.integers(len(lines)))
    if kind == 1:
        lines.insert(int(rng.integers(len(lines))), lines[k])
    elif kind == 2:
        del lines[k]
    else:
        lines[k] = odd_text(rng)
    return "\n".join(lines)


def encoded(rng: Rng, text: str) -> bytes:
    """``text`` in UTF-8, or now and then in another encoding, or with damaged bytes."""
    chance = rng.random()
    if chance < 0.08:
        return text.encode(pick(rng, ENCODINGS), "replace")
    content = text.encode("utf-8", "surrogatepass")
    return damage_bytes(rng, content) if chance < 0.3 else content


Path = tuple[Any, ...]


def _places(tree: Any, here: Path = ()) -> list[Path]:
    """All nodes below the root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in pairs:
        found += [(*here, key), *_places(value, (*here, key))]
    return found


def damage_tree(rng: Rng, tree: Any, most: int = 3) -> Any:
    """A copy of ``tree`` with some nodes replaced, taken out, doubled, renamed, wrapped, or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, most + 1))):
        places = _places(tree)
        if not places or rng.random() < 0.02:
            return odd_value(rng)
        # Evenly over depths: else nearly all damage would be to the leaves of the longest list.
        depth = pick(rng, sorted({len(place) for place in places}))
        *way, key = pick(rng, [place for place in places if len(place) == depth])
        parent = tree
        for step in way:
            parent = parent[step]
        alike = [place for place in places if place[-1] == key]
        if rng.random() < 0.1 and len(alike) > 1:  # such as the name of another image
            value: Any = tree
            for step in pick(rng, alike):
                value = value[step]
            parent[key] = copy.deepcopy(value)
        else:
            pick(rng, _TREE_DAMAGE)(rng, parent, key)
    return tree


def _replace(rng: Rng, parent: Any, key: Any) -> None:
    parent[key] = odd_value(rng)


def _remove(rng: Rng, parent: Any, key: Any) -> None:
    del parent[key]


def _double(rng: Rng, parent: Any, key: Any) -> None:
    if isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(parent[key]))
    else:
        parent[odd_text(rng)] = copy.deepcopy(parent[key])


def _rename(rng: Rng, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[pick(rng, (str(key).upper(), f" {key}", odd_text(rng)))] = parent.pop(key)
    else:
        parent.reverse()


def _wrap(rng: Rng, parent: Any, key: Any) -> None:
    parent[key] = pick(rng, ([parent[key]], {"a": parent[key]}, str(parent[key]), [parent[key], parent[key]]))


def _exchange(rng: Rng, parent: Any, key: Any) -> None:
    other = pick(rng, list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = copy.deepcopy(parent[other]), copy.deepcopy(parent[key])


def _copy_over(rng: Rng, parent: Any, key: Any) -> None:
    other = pick(rng, list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key] = copy.deepcopy(parent[other])


def _retype(rng: Rng, parent: Any, key: Any) -> None:
    value = parent[key]
    if isinstance(value, (int, float)):
        parent[key] = pick(rng, (float(min(value, 1e300)), str(value), bool(value), -value, value + 1))
    elif isinstance(value, str):
        parent[key] = pick(rng, (value.upper(), f" {value}\n", value + odd_text(rng), [value], len(value)))
    else:
        _replace(rng, parent, key)


_TREE_DAMAGE: tuple[Callable[[Rng, Any, Any], None], ...] = (
    _replace, _replace, _remove, _double, _rename, _wrap, _exchange, _copy_over, _retype, _retype,
)  # fmt: skip


def as_json(rng: Rng, tree: Any) -> bytes:
    """``tree`` as JSON text, in one of the spellings that JSON allows, and perhaps damaged as text."""
    text = json.dumps(tree, ensure_ascii=bool(rng.random() < 0.6), indent=pick(rng, (None, None, 1)))
    chance = rng.random()
    if chance < 0.08:
        text = damage_text(rng, text)
    elif chance < 0.12:  # the same key twice
        key = f'"{pick(rng, list(tree))}"' if isinstance(tree, dict) and tree else '"a"'
        text = text.replace("{", "{" + f"{key}: {json.dumps(odd_value(rng))}, ", 1)
    elif chance < 0.14:  # deeper than any stack
        deep = int(rng.integers(2_000, 120_000))
        text = pick(rng, ("[" * deep, '{"a":' * deep, text.replace(":", ":" + "[" * deep + "]" * deep + ",", 1)))
    elif chance < 0.15:
        text = text.replace("1", "1" * int(rng.integers(400, 6_000)), 1)
    return encoded(rng, text)
