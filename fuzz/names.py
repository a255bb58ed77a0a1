"""Class names, tables of predictions under them, and class files."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.class_names import read_class_file
from cbsa_lightning.inference.predictions import check_output, write_predictions
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, as_json, damage_text, damage_tree, encoded, odd_text, pick
from fuzz.tables import csv_rows


class ClassNames(Target):
    """``AnnotationTable`` under odd class and prompt names, and a table of predictions written under them."""

    name, share = "class names", 10

    def draw(self, rng: Rng) -> Case:
        """Names, prompt names and paths as options: they come from no file here."""
        names = [odd_text(rng) if rng.random() < 0.5 else f"class {k}" for k in range(int(rng.integers(0, 6)))]
        prompts = [odd_text(rng) for _ in range(len(names) + int(rng.integers(-1, 2)))] if rng.random() < 0.2 else []
        paths = [f"{i}.jpg" if rng.random() < 0.7 else odd_text(rng) for i in range(3)]
        options = {"names": names, "prompts": prompts, "paths": paths, "file": pick(rng, ("p.csv", "p.parquet"))}
        return Case({}, options, ("class", "annotation table", "p.csv", "p.parquet"))

    def run(self, case: Case, folder: Path) -> None:
        """Names must be the normal form of those given, and the written table must read back."""
        given = case.options
        table = AnnotationTable(
            folder,
            np.array(given["paths"], object),
            np.zeros((3, len(given["names"])), np.int8),
            given["names"],
            given["prompts"],
        )
        names = tuple(unicodedata.normalize("NFC", name).strip() for name in given["names"])
        if table.class_names != names or len(set(names)) != len(names) or not all(names):
            raise Silence(f"{given['names']!r} became {table.class_names!r}")
        table.digest()
        table.missing_files()
        file = folder / given["file"]
        check_output(file, names)
        scores = np.linspace(0, 1, 3 * len(names), dtype=np.float32).reshape(3, -1)
        write_predictions(file, table, names, scores, scores > 0.5)
        if file.suffix == ".csv":
            header, *rows = csv_rows(file.read_bytes().decode())
            columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        else:
            columns = pq.read_table(file).to_pydict()
            header = list(columns)
        if header != ["image", "labels", *names] or list(columns["image"]) != given["paths"]:
            raise Silence(f"the table of predictions reads back with {header!r}, {columns['image']!r}")
        back = np.array([columns[name] for name in names], dtype=np.float32).T
        if not np.array_equal(back, scores):
            raise Silence("scores read back as others")
        labels = [tuple(text.split(";")) if text != "none" else () for text in columns["labels"]]
        if labels != [tuple(name for name, s in zip(names, row, strict=True) if s > 0.5) for row in scores]:
            raise Silence(f"labels read back as {labels!r}")


CLASSES: dict[str, Any] = {
    "diningtable": "dining table",
    "person": None,
    "tvmonitor": {"prompt": "tv monitor", "synonyms": ["tv", "television"]},
    "no": "7",
}
_YAML = (
    "&a cat: *a", "a: &x [*x]", "a: &x {b: *x}", "*x : a", "? [a, b]\n: c", "<<: {cat: dog}", "cat: *undefined",
    "cat: !!python/name:os.system", "cat: !!python/object/apply:os.system [ls]", "cat: !foo bar", "!!binary aGk=: cat",
    "%YAML 9.9\n---\ncat: dog", "---\na: b\n---\nc: d", "cat: |\n  a\n  b", "cat: >\n  a\n\n  b", "cat: 'it''s'",
    'cat: "\\u0041\\x00"', "cat: 1_000", "cat: 0x10", "cat: ~", "cat: [", "cat: {", "\tcat: dog", "cat:dog", "- cat",
    "cat : dog", "cat: dog: cow", "!!set {a, b}", "!!omap [a: b]", "cat: 2001-01-01", "? cat\n? dog",
)  # fmt: skip


def _laughs(depth: int, kind: str) -> str:
    """Aliases of aliases: few lines that stand for 9 ** depth values."""
    lines = ["a0: &a0 lol"]
    for i in range(1, depth):
        refers = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} " + (f"[{refers}]" if kind == "list" else f"{{prompt: x, synonyms: [{refers}]}}"))
    return "\n".join(lines)


class ClassFiles(Target):
    """``read_class_file`` on damaged YAML and JSON."""

    name, share = "class files", 8

    def draw(self, rng: Rng) -> Case:
        """A tree damaged as such, as text or as bytes; and what only YAML has: anchors, tags, documents."""
        tree = damage_tree(rng, CLASSES) if rng.random() < 0.8 else CLASSES
        if rng.random() < 0.35:
            return Case({"c.json": as_json(rng, tree)})
        chance = rng.random()
        if chance < 0.03:
            text = _laughs(int(rng.integers(2, 14)), pick(rng, ("list", "mapping")))
        elif chance < 0.3:
            text = "sofa: couch\n" * (rng.random() < 0.5) + pick(rng, _YAML)
        elif chance < 0.32:
            text = pick(rng, ("[", "{a: ", "- ", "? ")) * int(rng.integers(10, 3_000))
        else:
            text = yaml.safe_dump(tree, allow_unicode=bool(rng.random() < 0.5), sort_keys=False)
        if rng.random() < 0.3:
            text = damage_text(rng, text)
        return Case({"c.yaml": encoded(rng, text)})

    def run(self, case: Case, folder: Path) -> None:
        """Classes must be the keys of the file, each once."""
        (name,) = case.files
        classes = read_class_file(folder / name)
        classes.prompts_for(classes.class_names)
        text = case.files[name].decode("utf-8-sig")
        if name == "c.json":
            keys = [key for key, _ in json.loads(text, object_pairs_hook=lambda pairs: pairs)]
        else:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            keys = [key.value for key, _ in node.value]
            if "!!python" in text and "'" not in text and '"' not in text and "#" not in text and "|" not in text:
                raise Silence("a tag that asks for Python was passed over")
        if classes.class_names != tuple(unicodedata.normalize("NFC", key).strip() for key in keys):
            raise Silence(f"{keys!r} became {classes.class_names!r}")
