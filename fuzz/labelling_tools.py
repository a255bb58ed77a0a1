"""Exports of labelling tools: Label Studio, CVAT, FiftyOne, Open Images, and JSON lines of cloud services."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers import CVAT, CloudLines, FiftyOne, LabelStudio, OpenImages
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, as_json, damage_text, damage_tree, encoded, odd_text, pick
from fuzz.tables import csv_rows, stay_inside

Answers = Iterable[Iterable[str]]

CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="labels" toName="image" choice="multiple">'
    '<Choice value="cat"/><Choice value="dog"/><Choice value="oak tree" alias="oak"/></Choices>'
    '<TextArea name="why" toName="image"/></View>'
)
CLASS_FILE = b"cat:\ndog: {synonyms: [hound]}\noak: oak tree\n"


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
        if not source.notes:
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


class CvatXml(Target):
    """``CVAT.train`` on damaged XML."""

    name, share = "CVAT XML", 6

    def draw(self, rng: Rng) -> Case:
        """Text or bytes damaged, and document types with entities."""
        content = encoded(rng, damaged_xml(rng, CVAT_XML))
        return Case({"a.xml": content}, {"untagged": pick(rng, ("unlabelled", "nothing"))})

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
        if case.options["untagged"] == "unlabelled":
            untagged = (table.labels != 1).all(axis=1)
            if not (table.labels[untagged] == -1).all():
                raise Silence("an image without a tag is labelled")
        elif (table.labels == -1).any():
            raise Silence("an image without a tag is unlabelled")
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
