"""Exports of labeling tools: CVAT, FiftyOne, Open Images, and JSON lines of cloud services."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbsa_lightning.data.readers import CVAT, CloudLines, FiftyOne, OpenImages
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, as_json, damage_text, damage_tree, encoded, odd_text, pick
from fuzz.plain_reading import check, clean, damaged_xml, plain_json
from fuzz.tables import csv_rows, stay_inside

CVAT_XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels>
<label><name>cat</name><type>tag</type></label>
<label><name>dog</name><type>any</type></label>
<label><name>box</name><type>rectangle</type></label>
</labels></task></meta>
<image id="0" name="a.jpg" width="64"><tag label="cat" source="manual"></tag><tag label="dog"/></image>
<image id="1" name="b/c.jpg"></image>
<image id="2" name="d &amp; e.jpg" subset="Train"><tag label="dog"><attribute name="score">.5</attribute></tag></image>
</annotations>
"""


class CvatXml(Target):
    """``CVAT.train`` on damaged XML."""

    name, share = "CVAT XML", 6

    def draw(self, rng: Rng) -> Case:
        """Text or bytes damaged, and document types with entities."""
        content = encoded(rng, damaged_xml(rng, CVAT_XML))
        return Case({"a.xml": content}, {"untagged": pick(rng, ("unlabeled", "nothing"))})

    def run(self, case: Case, folder: Path) -> None:
        """Images and tags must be those that a search of the text finds."""
        source = CVAT(str(folder / "a.xml"), **case.options)
        table, test = source.train(), source.test()
        text = case.files["a.xml"].decode("utf-8-sig")
        if "<!DOCTYPE" in text:
            raise Silence("a document type was read")
        rows = len(table) + (0 if test is None else len(test))
        if rows != len(re.findall(r"<image[\s>]", text)) and "<!--" not in text:
            raise Silence(f"{rows} rows, but the text has other images")
        tags = len({*re.findall(r'<image[^>]*>|<tag[^>]*label="[^"]*"', text)})
        present = int((table.labels == 1).sum()) + (0 if test is None else int((test.labels == 1).sum()))
        if (present == 0) != ("<tag" not in text) and "<!--" not in text:
            raise Silence(f"{present} labels, {tags} elements")
        if case.options["untagged"] == "unlabeled":
            untagged = (table.labels != 1).all(axis=1)
            if not (table.labels[untagged] == -1).all():
                raise Silence("an image without a tag is labeled")
        elif (table.labels == -1).any():
            raise Silence("an image without a tag is unlabeled")
        stay_inside(table)


FIFTYONE = {
    "classes": ["cat", "dog", "oak tree"],
    "labels": {
        "a": [{"label": 0, "confidence": 0.9}, {"label": 2}],
        "b/c": None,
        "d e": [],
        "f.g": [{"label": 1, "attributes": {"x": 1}}],
    },
}


class FiftyOneJson(Target):
    """``FiftyOne.train`` on damaged ``labels.json``."""

    name, share = "FiftyOne", 5
    images: Mapping[str, str] = {"a": "a.jpg", "b/c": "b/c.png", "d e": "d e.JPG", "f.g": "f.g.jpg", "h": "h.jpg"}

    def __init__(self) -> None:
        super().__init__()
        self.base = {f"data/{path}": b"" for path in self.images.values()}

    def draw(self, rng: Rng) -> Case:
        """A tree that is damaged as such, as text, or as bytes."""
        tree = damage_tree(rng, FIFTYONE) if rng.random() < 0.8 else FIFTYONE
        return Case({"labels.json": as_json(rng, tree)})

    def run(self, case: Case, folder: Path) -> None:
        """Labels must be those of a plain reading."""
        table = FiftyOne(str(folder / "labels.json")).train()
        content = plain_json((folder / "labels.json").read_text(encoding="utf-8-sig"))
        meant = []
        for key, value in content["labels"].items():
            if value is not None:
                found = [one["label"] if isinstance(one, dict) else one for one in _listed(value)]
                value = [[one if isinstance(one, str) else content["classes"][one] for one in found]]
            meant.append((self.images[key], value or []))
        check(table, meant)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


OPEN_IMAGES = [
    ["ImageID", "Source", "LabelName", "Confidence"],
    ["a", "verification", "/m/1", "1"], ["a", "verification", "/m/2", "0"], ["b", "machine", "/m/1", "0.7"],
    ["b", "verification", "/m/2", "1"], ["b", "crowdsource", "/m/2", "0.0"], ["c/d", "verification", "/m/9", "1.0"],
]  # fmt: skip


class OpenImagesCsv(Target):
    """``OpenImages.train`` on damaged label files and descriptions."""

    name, share = "Open Images", 5

    def __init__(self) -> None:
        super().__init__()
        self.base = {"names.csv": b'LabelName,DisplayName\n/m/1,Cat\n/m/2,"Dog, small"\n'}

    def draw(self, rng: Rng) -> Case:
        """Cells or bytes damaged, mostly of the labels."""
        rows = [list(row) for row in OPEN_IMAGES]
        for _ in range(int(rng.integers(0, 3))):
            pick(rng, rows)[int(rng.integers(4))] = odd_text(rng)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator=pick(rng, ("\n", "\r\n"))).writerows(rows)
        files = {"t.csv": encoded(rng, buffer.getvalue())}
        if rng.random() < 0.2:
            files["names.csv"] = encoded(rng, damage_text(rng, self.base["names.csv"].decode()))
        return Case(files, {"described": bool(rng.random() < 0.6)}, ("t.csv", "names.csv"))

    def run(self, case: Case, folder: Path) -> None:
        """Labels must be those of a plain reading."""
        names = str(folder / "names.csv") if case.options["described"] else None
        source = OpenImages(str(folder / "t.csv"), class_descriptions=names)
        table = source.train()
        stay_inside(table)
        rows = [row for row in csv_rows((folder / "t.csv").read_bytes().decode("utf-8-sig")) if row]
        header = [clean(cell) for cell in rows[0]]
        meaning = None
        if names:
            text = (folder / "names.csv").read_bytes().decode("utf-8-sig")
            meaning = {row[0].strip(): clean(row[1]) for row in csv_rows(text) if row}
        said: dict[str, dict[str, set[int]]] = {}
        for row in rows[1:]:
            cell = {name: text.strip() for name, text in zip(header, row, strict=True)}
            label = clean(cell["LabelName"]) if meaning is None else meaning.get(cell["LabelName"])
            path = posixpath.normpath(f"{cell['ImageID']}.jpg".replace("\\", "/"))
            of_image = said.setdefault(path, {})
            if label is not None and float(cell["Confidence"]) in (0, 1):
                of_image.setdefault(label, set()).add(int(float(cell["Confidence"])))
        expected = {}
        for path, of_image in said.items():
            found = [of_image.get(name, set()) for name in table.class_names]
            expected[path] = [min(values) if len(values) == 1 else -1 for values in found]
        if dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True)) != expected:
            raise Silence(f"labels {table.labels.tolist()}, expected {expected}")


_METADATA = {"class-map": {"0": "cat", "1": "dog"}, "type": "groundtruth/image-classification-multilabel"}
LINES = {
    "SageMaker": [
        {"source-ref": "s3://b/photos/a.jpg", "tags": [0, 1], "tags-metadata": _METADATA | {"human-annotated": "yes"}},
        {"source-ref": "s3://b/photos/b/c.jpg", "tags": [], "tags-metadata": _METADATA},
        {"source-ref": "s3://b/photos/d%20e.jpg"},
    ],
    "Vertex AI": [
        {"imageGcsUri": "s3://b/photos/a.jpg", "classificationAnnotations": [{"displayName": "cat"}]},
        {"imageGcsUri": "s3://b/photos/b/c.jpg"},
        {"imageGcsUri": "s3://b/photos/d.jpg", "classificationAnnotations": [{"displayName": "dog"}],
         "dataItemResourceLabels": {"aiplatform.googleapis.com/ml_use": "training"}},
    ],
}  # fmt: skip


class CloudJsonLines(Target):
    """``CloudLines.train`` on damaged lines of either service."""

    name, share = "cloud JSON lines", 5

    def draw(self, rng: Rng) -> Case:
        """Trees that are damaged as such, as text, or as bytes."""
        lines = LINES[pick(rng, list(LINES))]
        trees = damage_tree(rng, lines) if rng.random() < 0.8 else lines
        text = "\n".join(json.dumps(tree, ensure_ascii=bool(rng.random() < 0.5)) for tree in _listed(trees))
        return Case({"t.jsonl": encoded(rng, damage_text(rng, text) if rng.random() < 0.15 else text)})

    def run(self, case: Case, folder: Path) -> None:
        """Labels must be those of a plain reading."""
        source = CloudLines(str(folder / "t.jsonl"), prefix="s3://b/photos")
        table, test = source.train(), source.test()
        text = (folder / "t.jsonl").read_bytes().decode("utf-8-sig")
        lines = [plain_json(line) for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if test is not None:
            if len(table) + len(test) != len(lines):
                raise Silence("a line was lost")
            return
        meant = []
        for line in lines:
            answers = []
            if "imageGcsUri" in line:
                found = list(line.get("classificationAnnotations", ()))
                found += [line["classificationAnnotation"]] if "classificationAnnotation" in line else []
                answers = [[one["displayName"] for one in found]] if found else []
            elif metadata := next((value for key, value in line.items() if key.endswith("-metadata")), None):
                name = next(key for key in line if key.endswith("-metadata")).removesuffix("-metadata")
                answers = [[metadata["class-map"][str(code)] for code in line[name]]]
            image = line.get("imageGcsUri", line.get("source-ref"))
            if not image.startswith("s3://b/photos/"):
                raise Silence(f"{image!r} does not lie below the prefix")
            meant.append((image.removeprefix("s3://b/photos/"), answers))
        check(table, meant)
