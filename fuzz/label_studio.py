"""Exports of Label Studio: JSON, JSON_MIN, CSV, configurations, and what its tasks call an image."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cbsa_lightning.data.readers import LabelStudio
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, as_json, damage_text, damage_tree, encoded, odd_text, pick
from fuzz.plain_reading import check, clean, damaged_xml, plain_json, unescaped
from fuzz.tables import csv_rows, stay_inside

CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="labels" toName="image" choice="multiple">'
    '<Choice value="cat"/><Choice value="dog"/><Choice value="oak tree" alias="oak"/></Choices>'
    '<TextArea name="why" toName="image"/></View>'
)
CLASS_FILE = b"cat:\ndog: {synonyms: [hound]}\noak: oak tree\n"


def place(image: str) -> str:
    """Path below "photos" that a task means, with the prefix "photos"."""
    parts = urlsplit(image)
    location = parse_qs(parts.query)["d"][0] if parts.path.endswith("/data/local-files/") else image
    if not location.startswith("photos/"):
        raise Silence(f"{image!r} does not lie below the prefix")
    return location.removeprefix("photos/")


def _result(*names: str) -> dict[str, Any]:
    return {"from_name": "labels", "to_name": "image", "type": "choices", "value": {"choices": list(names)}}


def _answer(*results: dict[str, Any], skipped: bool = False) -> dict[str, Any]:
    return {"id": 3, "completed_by": 1, "result": list(results), "was_cancelled": skipped}


def tasks() -> list[dict[str, Any]]:
    """A small export with all states of a task."""
    why = {"from_name": "why", "to_name": "image", "type": "textarea", "value": {"text": ["dark"]}}
    annotations = [
        [_answer(_result("cat", "dog")), _answer(_result("cat"), why)],
        [_answer(skipped=True)],
        [_answer(), _answer(_result())],
        [],
        [_answer(_result("oak"))],
    ]
    names = ("a.jpg", "b/c.jpg", "d%20e.jpg", "f.jpg", "a.jpg")
    return [
        {
            "id": k, "annotations": of_task, "drafts": [{"result": []}] if k == 3 else [], "predictions": [k],
            "data": {"image": f"/data/local-files/?d=photos/{name}"} | ({"path": "p/q.jpg"} if k == 2 else {}),
            "meta": {}, "project": 1,
        }
        for k, (of_task, name) in enumerate(zip(annotations, names, strict=True))
    ]  # fmt: skip


class LabelStudioJson(Target):
    """``LabelStudio.train`` on damaged JSON, with the configuration, a class file, or neither."""

    name, share = "Label Studio JSON", 8

    def __init__(self) -> None:
        super().__init__()
        self.base = {"c.xml": CONFIG.encode(), "c.yaml": CLASS_FILE}

    def draw(self, rng: Rng) -> Case:
        """A tree that is damaged as such, as text, or as bytes."""
        tree = tasks()
        content = as_json(rng, damage_tree(rng, tree) if rng.random() < 0.8 else tree)
        options = pick(rng, ({"label_config": "c.xml"}, {"class_file": "c.yaml"}, {}))
        return Case({"t.json": content}, options, ("t.json", "c.yaml"))

    def run(self, case: Case, folder: Path) -> None:
        """Labels must be those of a plain reading."""
        files = {name: str(folder / file) for name, file in case.options.items()}
        source = LabelStudio(str(folder / "t.json"), prefix="photos", control="labels", **files)
        table = source.train()
        meant = []
        for task in plain_json((folder / "t.json").read_text(encoding="utf-8-sig")):
            path = task["data"].get("path") or place(task["data"]["image"])
            submitted = [one["result"] for one in task["annotations"] if one.get("was_cancelled", False) is not True]
            results = [[one for one in results if one.get("from_name") == "labels"] for results in submitted]
            meant.append((path, [[n for one in found for n in one["value"]["choices"]] for found in results]))
        if case.options.get("class_file"):
            meant = [(path, [["dog" if n == "hound" else n for n in one] for one in found]) for path, found in meant]
        check(table, meant)
        if not source.describe():
            raise Silence("an export of all states has no note")


MIN = [
    {"image": "/data/local-files/?d=photos/a.jpg", "id": 1, "labels": "cat", "annotator": 1, "annotation_id": 4},
    {"image": "/data/local-files/?d=photos/a.jpg", "id": 1, "labels": {"choices": ["cat", "dog"]}, "annotation_id": 5},
    {"image": "/data/local-files/?d=photos/b/c.jpg", "id": 2, "annotation_id": 6, "lead_time": 2.5},
    {"image": "/data/local-files/?d=photos/d%20e.jpg", "id": 3, "annotation_id": None, "doubt": 0.5},
    {"image": "/data/local-files/?d=photos/f.jpg", "id": 4, "labels": {"choices": []}, "annotation_id": 7},
]  # fmt: skip


class LabelStudioRows(Target):
    """``LabelStudio.train`` on damaged JSON_MIN and CSV."""

    name, share = "Label Studio rows", 6

    def draw(self, rng: Rng) -> Case:
        """A tree or a table that is damaged as such, as text, or as bytes."""
        if rng.random() < 0.5:
            return Case({"t.json": as_json(rng, damage_tree(rng, MIN) if rng.random() < 0.8 else MIN)})
        header = ["annotation_id", "id", "image", "labels"]
        rows = [[row.get(name) for name in header] for row in MIN]
        cells = [[json.dumps(cell) if isinstance(cell, dict) else cell for cell in row] for row in [header, *rows]]
        for _ in range(int(rng.integers(0, 3))):
            pick(rng, cells)[int(rng.integers(4))] = odd_text(rng)
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=pick(rng, (",", "\t")), quoting=csv.QUOTE_ALL).writerows(cells)
        text = buffer.getvalue()
        return Case({"t.csv": encoded(rng, damage_text(rng, text) if rng.random() < 0.2 else text)})

    def run(self, case: Case, folder: Path) -> None:
        """Labels must be those of a plain reading."""
        (name,) = case.files
        table = LabelStudio(str(folder / name), prefix="photos", control="labels").train()
        text = (folder / name).read_bytes().decode("utf-8-sig")
        rows: list[Mapping[str, Any]]
        if name == "t.json":
            rows = plain_json(text)
        else:
            header_line = text.split("\n")[0]
            lines = [row for row in csv_rows(text, "," if "," in header_line else "\t") if row]
            header = [clean(cell) for cell in lines[0]]
            rows = [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]
        meant = []
        for row in rows:
            value = row.get("labels", {"choices": []})
            if name == "t.csv":
                value = json.loads(value) if value.startswith('{"choices"') else value or {"choices": []}
            answers = []
            if row["annotation_id"] not in (None, ""):
                answers = [[value] if isinstance(value, str) else value["choices"]]
            meant.append((row.get("path") or place(row["image"]), answers))
        check(table, meant)


class LabelConfigs(Target):
    """``LabelStudio.class_names`` of a damaged configuration."""

    name, share = "Label Studio configurations", 3

    def __init__(self) -> None:
        super().__init__()
        self.base = {"t.json": json.dumps(tasks()).encode()}

    def draw(self, rng: Rng) -> Case:
        """Text or bytes damaged, and document types with entities."""
        return Case({"c.xml": encoded(rng, damaged_xml(rng, CONFIG))}, {}, ("c.xml", "t.json"))

    def run(self, case: Case, folder: Path) -> None:
        """The classes must be the aliases or values of the choices in the text."""
        source = LabelStudio(str(folder / "t.json"), label_config=str(folder / "c.xml"), prefix="photos")
        names = source.class_names
        text = case.files["c.xml"].decode("utf-8-sig")
        for name in names:
            if name not in unicodedata.normalize("NFC", unescaped(text)):
                raise Silence(f"class {name!r} is not in the configuration")
        stay_inside(source.train())


LOCATIONS = (
    "/data/local-files/?d={}", "http://localhost:8080/data/local-files/?d={}", "https://host/p/{}", "s3://b/p/{}", "{}",
    "/data/upload/1/0a1b2c3d-{}", "http://localhost/data/upload/{}", "p/{}",
)  # fmt: skip


class ImageLocations(Target):
    """``LabelStudio.train`` on odd paths and URLs of images, with and without a prefix."""

    name, share = "image locations", 4
    images = ("a.jpg", "b/c.jpg", "b/a.jpg", "d/e f.png", "0a1b2c3d-g.jpg", "p/h.jpg")

    def __init__(self) -> None:
        super().__init__()
        self.base = dict.fromkeys(self.images, b"")

    def draw(self, rng: Rng) -> Case:
        """Values that mean images, or odd texts, in all forms of a path or URL."""
        values = []
        for _ in range(int(rng.integers(1, 4))):
            name = pick(rng, (*self.images, *self.images, "c.jpg", "e%20f.png", "h.jpg", odd_text(rng)))
            values.append(pick(rng, LOCATIONS).replace("{}", name))
        if rng.random() < 0.2:
            values.append(values[0])
        tree = [{"data": {"image": value}, "annotations": [_answer(_result("cat"))]} for value in values]
        prefix = pick(rng, (None, None, "p", "s3://b/p", "https://host/p/", odd_text(rng)))
        return Case({"t.json": json.dumps(tree).encode()}, {"prefix": prefix}, ("t.json", "prefix"))

    def run(self, case: Case, folder: Path) -> None:
        """Each image must be one that lies there and has the name, or what follows the prefix."""
        table = LabelStudio(str(folder / "t.json"), prefix=case.options["prefix"]).train()
        stay_inside(table)
        values = [task["data"]["image"] for task in json.loads(case.files["t.json"])]
        for path in table.paths.tolist():
            name = path.rpartition("/")[2].removeprefix("0a1b2c3d-")
            if case.options["prefix"] is None and path not in self.images:
                raise Silence(f"{path!r} is no image that lies there")
            if not any(name in value or name in unquote(value).replace("\\", "/") for value in values):
                raise Silence(f"{path!r} is none of {values}")
