"""What is given to predict: folders, lists, tables."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cbsa_lightning.data.readers.unlabeled import read_images
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, encoded, odd_text, pick
from fuzz.tables import stay_inside


class PredictInputs(Target):
    """``read_images`` on folders with odd names, lists and tables."""

    name, share = "predict inputs", 7

    def draw(self, rng: Rng) -> Case:
        """A folder (names in the options, since they need not be text), a list, or a table."""
        kind = pick(rng, ("folder", "folder", "list", "table"))
        if kind == "folder":
            return Case({}, {"names": self._names(rng)}, ("photos",))
        lines = ["a.jpg", "sub/b.jpg", "c d.jpg"]
        for _ in range(int(rng.integers(1, 3))):
            lines.insert(int(rng.integers(len(lines) + 1)), pick(rng, (odd_text(rng), odd_text(rng), lines[0])))
        if kind == "table":
            lines.insert(0, pick(rng, ("image", "path", "file,labels", odd_text(rng))))
        text = pick(rng, ("\n", "\n", "\r\n", "\r")).join(lines)
        name = pick(rng, ("l.txt",)) if kind == "list" else pick(rng, ("l.csv", "l.TSV", "l", "l.jpg"))
        return Case({name: encoded(rng, text)}, {"outside": bool(rng.random() < 0.2)}, ("l.", "l:", "l,", "/l "))

    @staticmethod
    def _names(rng: Rng) -> list[bytes]:
        names = []
        for _ in range(int(rng.integers(1, 5))):
            parts = []
            for _ in range(int(rng.integers(1, 3))):
                part = odd_text(rng).encode("utf-8", "surrogatepass") if rng.random() < 0.6 else b"a"
                if rng.random() < 0.1:
                    part = rng.bytes(4)
                parts.append(part.replace(b"/", b"").replace(b"\0", b"")[:100].strip(b".") or b"b")
            names.append(b"/".join(parts) + pick(rng, (b".jpg", b".PNG", b".jp2", b".txt", b"")))
        return names

    def run(self, case: Case, folder: Path) -> None:
        """A folder's table must have all images that lie in it; a list's, all lines."""
        if case.files:
            (name,) = case.files
            if name.endswith("jpg"):
                table = read_images(folder / name, ["cat"])
                if table.paths.tolist() != [name]:
                    raise Silence("one image is not that image")
                return
            table = read_images(folder / name, ["cat"], allow_outside=case.options["outside"])
            if not case.options["outside"]:
                stay_inside(table)
            if name == "l.txt":
                text = case.files[name].decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
                lines = text.rstrip().split("\n")
                if len(lines) != len(table):
                    raise Silence(f"{len(table)} rows of {len(lines)} lines")
            return
        photos = folder / "photos"
        try:
            photos.mkdir()
            made = set()
            for name in case.options["names"]:
                path = os.fsencode(photos) + b"/" + name
                try:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    Path(os.fsdecode(path)).write_bytes(b"x")
                except OSError:
                    continue
                hidden = any(part.startswith(b".") for part in name.split(b"/"))
                if name.lower().endswith((b".jpg", b".png", b".jp2")) and not hidden:
                    made.add(os.path.normpath(path))
            table = read_images(photos, ["cat"])
            if {os.fsencode(table.file(i)) for i in range(len(table))} != made:
                raise Silence(f"{len(table)} rows of {len(made)} images")
            if table.missing_files():
                raise Silence(f"does not find {table.missing_files()}")
        finally:
            shutil.rmtree(photos)
