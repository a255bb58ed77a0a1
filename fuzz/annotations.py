"""Annotation files of the benchmarks: COCO's JSON, VOC's flags, NUS-WIDE's lists and matrices."""

from __future__ import annotations

import io
import json
import posixpath
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from cbsa_lightning.data.readers.coco import COCO
from cbsa_lightning.data.readers.nuswide import NUSWIDE, NUSWIDE_CLASSES
from cbsa_lightning.data.readers.voc import VOC, VOC_CLASSES
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, as_json, damage_bytes, damage_tree, encoded, odd_text, pick
from fuzz.tables import stay_inside


def coco_tree() -> dict[str, Any]:
    """A small "instances" file."""
    return {
        "info": {"year": 2014},
        "images": [{"id": 10 * i, "file_name": f"{i}.jpg", "width": 40} for i in range(1, 6)],
        "annotations": [
            {"id": k, "image_id": image, "category_id": category, "iscrowd": 0, "segmentation": [[0, 0, 4, 0, 4, 4]]}
            for k, (image, category) in enumerate([(10, 7), (20, 2), (20, 7), (20, 7), (30, 4), (50, 4)])
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 4, "name": "potted plant"}],
    }


class CocoFile(Target):
    """``COCO.train`` and ``COCO.class_names`` on a damaged file."""

    name, share = "COCO", 9

    def draw(self, rng: Rng) -> Case:
        """A tree that is damaged as such, as text, or as bytes."""
        tree = coco_tree()
        file = {"i.json": as_json(rng, damage_tree(rng, tree) if rng.random() < 0.8 else tree)}
        return Case(file, {"unannotated": pick(rng, (None, "drop", "unlabeled", "empty"))})

    def run(self, case: Case, folder: Path) -> None:
        """Rows and labels must be the images and pairs that a plain reading of the file finds."""
        unannotated = case.options["unannotated"]
        source = COCO(str(folder), train_annotations="i.json", train_images="images", unannotated=unannotated)
        table = source.train()
        if source.class_names != table.class_names:
            raise Silence(f"class_names gives {source.class_names}, the table has {table.class_names}")
        twice: list[str] = []

        def paired(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys = [key for key, _ in pairs]
            twice.extend(key for k, key in enumerate(keys) if key in keys[:k])
            return dict(pairs)

        content = json.loads((folder / "i.json").read_text(encoding="utf-8-sig"), object_pairs_hook=paired)
        if {"images", "annotations", "categories", "id", "file_name", "name", "image_id", "category_id"} & set(twice):
            raise Silence("a key stands there twice, and one value was dropped")
        # As text, since True == 1 == 1.0 in Python.
        pairs = {(json.dumps(a["image_id"]), json.dumps(a["category_id"])) for a in content["annotations"]}
        annotated = {image for image, _ in pairs}
        images = annotated if unannotated == "drop" else {json.dumps(image["id"]) for image in content["images"]}
        unknown = (table.labels == -1).all(axis=1).sum()
        if unknown != (len(images - annotated) if unannotated in (None, "unlabeled") else 0):
            raise Silence(f"{unknown} unlabeled rows of {len(table)}")
        if (len(table), int((table.labels == 1).sum())) != (len(images), len(pairs)):
            raise Silence(f"{len(table)} rows, {int(table.labels.sum())} labels; {len(images)}, {len(pairs)} expected")
        names = {json.dumps(category["id"]): category["name"] for category in content["categories"]}
        stated = {json.dumps(image["id"]): image["file_name"] for image in content["images"]}
        if any(not isinstance(stated[image], str) for image in images):
            raise Silence("an image whose file_name is no text")
        if any(not isinstance(category["name"], str) for category in content["categories"]):
            raise Silence("a category whose name is no text")
        path_of = {image: posixpath.normpath("images/" + stated[image].replace("\\", "/")) for image in images}
        expected: dict[str, set[str]] = {path: set() for path in path_of.values()}
        for image, category in pairs:
            expected[path_of[image]].add(unicodedata.normalize("NFC", names[category]).strip())
        found = {
            str(path): {table.class_names[k] for k in np.flatnonzero(row == 1)}
            for path, row in zip(table.paths, table.labels, strict=True)
        }
        if found != expected:
            raise Silence(f"labels {found}, expected {expected}")


_VOC_PLACES = ("_train.txt", "ImageSets/Main")


class VocFlags(Target):
    """``VOC.train`` on damaged flags of one or two classes."""

    name, share = "VOC ImageSets", 5

    def __init__(self) -> None:
        super().__init__()
        self.base = {
            self._file(name): "".join(
                f"2008_{i:06d} {(1 if (i + k) % 5 == 0 else 0 if (i + k) % 7 == 0 else -1):2d}\n" for i in range(8)
            ).encode()
            for k, name in enumerate(VOC_CLASSES)
        }

    @staticmethod
    def _file(name: str) -> str:
        return f"VOCdevkit/VOC2012/ImageSets/Main/{name}_train.txt"

    def draw(self, rng: Rng) -> Case:
        """Lines, flags or bytes damaged; sometimes all 20 files alike, so that the lists still agree."""
        if rng.random() < 0.4:
            odd = odd_text(rng)
            files = {
                name: content.replace(b"2008_000003", odd.encode("utf-8", "surrogatepass"))
                for name, content in self.base.items()
            }
            return Case(files, {}, _VOC_PLACES)
        names = [self._file(pick(rng, VOC_CLASSES)) for _ in range(int(rng.integers(1, 3)))]
        return Case({name: self._damaged(rng, self.base[name]) for name in names}, {}, _VOC_PLACES)

    def _damaged(self, rng: Rng, content: bytes) -> bytes:
        lines = content.decode().splitlines()
        for _ in range(int(rng.integers(1, 3))):
            k = int(rng.integers(len(lines)))
            image, flag = lines[k].split() if len(lines[k].split()) == 2 else ("2008_000001", "1")
            lines[k] = pick(
                rng,
                (
                    f"{image}  {odd_text(rng)}", f"{odd_text(rng)} {flag}", f"{image}\t{flag}\t", f"{flag} {image}",
                    f"{image} +1", f"{image} 01", f"{image} 1.0", f"{image} ١", "", image, f"{image} 1 1",
                    f"{image}\u00a01", f"{image}\x0c1", f"../{image} 1",
                ),
            )  # fmt: skip
        return encoded(rng, pick(rng, ("\n", "\r\n", "\r", "\n\n", "\x0b")).join(lines))

    def run(self, case: Case, folder: Path) -> None:
        """Rows must be the images with a flag 1, by a plain reading of the lines."""
        table = VOC(str(folder)).train()
        positive: dict[str, set[str]] = {}
        for name in self.base:
            kind = name.rpartition("/")[2].removesuffix("_train.txt")
            for line in (folder / name).read_bytes().decode("utf-8-sig").replace("\r", "\n").split("\n"):
                if line.split()[1:] == ["1"]:
                    positive.setdefault(f"JPEGImages/{line.split()[0]}.jpg", set()).add(kind)
        found = {
            str(path): {VOC_CLASSES[k] for k in np.flatnonzero(row == 1)}
            for path, row in zip(table.paths, table.labels, strict=True)
        }
        if found != {posixpath.normpath(path.replace("\\", "/")): kinds for path, kinds in positive.items()}:
            raise Silence(f"labels {found}, expected {positive}")
        stay_inside(table)


_LISTS = {"text": ("images.txt", "labels.csv"), "npy": ("images.npy", "labels.npy")}


class NusWideFiles(Target):
    """``NUSWIDE.train`` in both layouts on damaged lists and labels."""

    name, share = "NUS-WIDE", 5
    images = ("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg", "c d/5.jpg")

    def __init__(self) -> None:
        super().__init__()
        self.labels = (np.random.default_rng(0).random((5, 81)) < 0.1).astype(np.int8)
        self.base = {
            "ImageList/TrainImagelist.txt": "".join(f"{n} \r\n" for n in self.images).replace("/", "\\").encode()
        }
        for k, name in enumerate(NUSWIDE_CLASSES):
            column = "".join(f"{value}\n" for value in self.labels[:, k])
            self.base[f"TrainTestLabels/Labels_{name}_Train.txt"] = column.encode()
        matrix = "".join(",".join(map(str, row)) + "\n" for row in self.labels.tolist())
        self.base |= {"images.txt": "\n".join(self.images).encode(), "labels.csv": matrix.encode()}
        self.base |= {"images.npy": _npy(np.array(self.images)), "labels.npy": _npy(self.labels.astype(float))}

    def draw(self, rng: Rng) -> Case:
        """One file damaged; a ".npy" also by arrays of another shape or type."""
        layout = pick(rng, ("official", "text", "npy"))
        if layout == "official":
            files = [name for name in self.base if "/" in name]
            name = pick(rng, (files[0], pick(rng, files)))
        else:
            name = pick(rng, _LISTS[layout])
        content = self.base[name]
        if name.endswith(".npy") and rng.random() < 0.5:
            content = _npy(self._odd_array(rng, name))
        elif name.endswith(".npy"):
            content = damage_bytes(rng, content[: pick(rng, (128, len(content)))], 4)
        else:
            cells = content.decode().replace(" \r", "\r")
            old = pick(rng, ("1", "0", ",", "\n", "jpg", "b"))
            cells = cells.replace(old, odd_text(rng), 1) if rng.random() < 0.7 else cells + odd_text(rng)
            content = encoded(rng, cells)
        return Case({name: content}, {"layout": layout}, ("images.", "labels.", "Imagelist.txt", "/Labels_"))

    def _odd_array(self, rng: Rng, name: str) -> np.ndarray:
        if name == "images.npy":
            odd = list(self.images)
            odd[int(rng.integers(5))] = odd_text(rng).encode("utf-8", "replace").decode()
            return pick(
                rng,
                (
                    np.array(odd),
                    np.array(odd[:4]),
                    np.array([odd]),
                    np.array([name.encode() for name in odd]),
                    np.arange(5),
                ),
            )
        labels = self.labels.astype(
            pick(rng, (float, np.float16, np.int64, np.uint8, bool, complex, "S1", "U9", "M8[s]"))
        )
        if labels.dtype.kind in "fiuc":
            labels[int(rng.integers(5)), int(rng.integers(81))] = pick(rng, (0.5, 2, 255, 1, 0))
        if labels.dtype.kind in "fc":
            labels[0, 0] = pick(rng, (np.nan, np.inf, -1, 1))
        return pick(
            rng, (labels, labels, labels.T, labels[:4], labels.ravel(), labels[..., None], np.asfortranarray(labels))
        )

    def run(self, case: Case, folder: Path) -> None:
        """Rows must be the images of the list, and labels those of the files."""
        layout = case.options["layout"]
        ends = (".txt", ".csv") if layout == "text" else (".npy", ".npy")
        lists = {"layout": "list", "train_images": f"images{ends[0]}", "train_labels": f"labels{ends[1]}"}
        table = NUSWIDE(str(folder), **({} if layout == "official" else lists)).train()
        count = ones = -1
        if layout == "official":
            files = [name for name in self.base if "Labels_" in name]
            ones = sum((folder / name).read_text(encoding="utf-8-sig").count("1") for name in files)
            count = self._lines(folder / "ImageList/TrainImagelist.txt")
        elif layout == "text":
            count = self._lines(folder / "images.txt")
        if count >= 0 and len(table) != count:
            raise Silence(f"{len(table)} rows, but the list has {count} lines")
        if ones >= 0 and int(table.labels.sum()) != ones:
            raise Silence(f"{int(table.labels.sum())} labels, but the files have {ones}")
        if layout == "npy" and len(table) != len(np.load(folder / "images.npy")):
            raise Silence("another number of rows than the array has")
        stay_inside(table)

    @staticmethod
    def _lines(file: Path) -> int:
        return len(file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n"))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
