"""Split files: JSON damaged as a tree, as text, as bytes, and with its digest made to fit again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.splits import PARTS, Split, hold_out, split_labeled
from cbsa_lightning.errors import CBSAError
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, as_json, damage_tree, odd_value, pick

ROWS = 12

KEYS = {"labeled": "labelled", "unlabeled": "unlabelled", "held_out": "held_out"}  # of the parts in a file


class SplitFiles(Target):
    """``Split.load`` and the use of what it gives."""

    name, share = "split files", 8

    def __init__(self) -> None:
        super().__init__()
        paths = np.array([f"{i}.jpg" for i in range(ROWS)], dtype=np.dtypes.StringDType())
        self.table = AnnotationTable(Path("/images"), paths, np.eye(ROWS, 3, dtype=np.int8), ("a", "b", "c"))
        split = hold_out(split_labeled(ROWS, 0.5, 1, self.table.digest()), 0.4, 2)
        self.record: dict[str, Any] = {
            "format": "cbsa_lightning split 1",
            "table_digest": self.table.digest(),
            "digest": split.digest,
            "fraction": split.fraction,
            "seed": split.seed,
            **{KEYS[part]: getattr(split, part).tolist() for part in PARTS},
        }

    def draw(self, rng: Rng) -> Case:
        """A damaged record."""
        record = damage_tree(rng, self.record) if rng.random() < 0.6 else dict(self.record)
        if rng.random() < 0.4 and isinstance(record, dict):
            key = pick(rng, ("fraction", "seed", *KEYS.values()))
            record[key] = odd_value(rng)
            if key in KEYS.values() and isinstance(self.record[key], list):
                rows = list(self.record[key])
                rows[int(rng.integers(len(rows)))] = pick(rng, (odd_value(rng), ROWS, 10**6, 0, True))
                record[key] = rows
        if rng.random() < 0.7 and isinstance(record, dict):
            # As someone would who edits the rows and takes the digest from our own message.
            with contextlib.suppress(CBSAError, KeyError, OverflowError, ValueError, TypeError):
                record["digest"] = Split(*(record[key] for key in KEYS.values())).digest
        return Case({"split.json": as_json(rng, record)})

    def run(self, case: Case, folder: Path) -> None:
        """Parts must be those of the file, rows of the table."""
        split = Split.load(folder / "split.json", self.table)
        content = json.loads(case.files["split.json"].decode("utf-8-sig"), object_pairs_hook=list)
        if len({key for key, _ in content}) < len(content):
            raise Silence("a key stands there twice, and one value was dropped")
        record = dict(content)
        for part in PARTS:
            rows = getattr(split, part)
            if json.dumps(rows.tolist()) != json.dumps(record[KEYS[part]]):
                raise Silence(f"{part} became {rows.tolist()}, the file has {record[KEYS[part]]}")
            self.table.select(rows)
        fraction, seed = split.fraction, split.seed
        if fraction is not None and not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
            raise Silence(f"fraction {fraction!r}")
        if seed is not None and type(seed) is not int:
            raise Silence(f"seed {seed!r}")
        if isinstance(fraction, bool):
            raise Silence("fraction true")
