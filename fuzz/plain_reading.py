"""What the fuzz targets of labeling tools share: plain readings to compare with, and damaged XML."""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from cbsa_lightning.data.annotations import AnnotationTable
from fuzz.harness import Silence
from fuzz.mutations import Rng, damage_text, odd_text, pick
from fuzz.tables import stay_inside

Answers = Iterable[Iterable[str]]


def check(table: AnnotationTable, meant: Iterable[tuple[str, Answers]]) -> None:
    """Compares a table with the answers for each image, of a plain reading; answers that differ make a class unknown.

    Raises:
        Silence: A path or label differs.
    """
    stay_inside(table)
    by_path: dict[str, list[set[str]]] = {}
    for path, answers in meant:
        of_image = by_path.setdefault(posixpath.normpath(path.replace("\\", "/")), [])
        of_image += [{clean(label) for label in answer} for answer in answers]
    expected = {}
    for path, of_image in by_path.items():
        row = [{name in answer for answer in of_image} for name in table.class_names]
        expected[path] = [-1 if len(said) != 1 else int(said.pop()) for said in row]
    found = dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))
    if found != expected:
        raise Silence(f"labels {found}, expected {expected}")
    for answer in (answer for of_image in by_path.values() for answer in of_image):
        if not answer <= set(table.class_names):
            raise Silence(f"labels {answer} that are no class were dropped")


def clean(text: str) -> str:
    """A label in normal form."""
    return unicodedata.normalize("NFC", text).strip()


def plain_json(text: str) -> Any:
    """Content of a JSON text.

    Raises:
        Silence: A key stands twice.
    """

    def paired(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise Silence("a key stands there twice, and one value was dropped")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=paired)


BOMB = '<!DOCTYPE b [<!ENTITY a "aaaaaaaaaa"><!ENTITY c "&a;&a;&a;&a;">]>'


def damaged_xml(rng: Rng, text: str) -> str:
    """XML with values, tags or lines damaged, or with a document type."""
    for _ in range(int(rng.integers(0, 3))):
        kind = rng.integers(6)
        values = re.findall(r'"[^"]*"|>[^<>]+<', text)
        if kind in (0, 1) and values:
            old = pick(rng, values)
            text = text.replace(old, old[0] + odd_text(rng) + old[-1], 1)
        elif kind == 2:
            tags = re.findall(r"<(\w+)", text)
            text = text.replace(pick(rng, tags or ["a"]), pick(rng, ("box", "tag", "image", "Choice", "x", "label")), 1)
        elif kind == 3:
            text = damage_text(rng, text)
        elif kind == 4 and rng.random() < 0.4:
            text = BOMB + text.replace('"cat"', '"&c;"')
        elif kind == 5 and rng.random() < 0.3:
            deep = int(rng.integers(100, 60_000))
            text = text.replace("<image", "<a>" * deep + "</a>" * deep + "<image", 1)
    return text


def unescaped(text: str) -> str:
    """Text with the characters that XML's references stand for, and white space in attributes as spaces."""
    text = re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), text)
    for mark, name in (("<", "lt"), (">", "gt"), ('"', "quot"), ("'", "apos"), ("&", "amp")):
        text = text.replace(f"&{name};", mark)
    return text.replace("\r\n", "\n").replace("\n", " ").replace("\t", " ").replace("\r", " ")
