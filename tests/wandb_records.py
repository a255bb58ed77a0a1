"""Reads the records of an offline W&B run."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record

BLOCK = 32 * 1024
HEADER = 7  # of the file, and of each chunk: checksum (4 bytes), length (2), kind (1)
FULL, LAST = 1, 4


def records(file: Path) -> Iterator[Record]:
    """Yields the records of a .wandb file, which has the log format of LevelDB: chunks that do not cross blocks."""
    content, place, parts = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block is padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""


def finished_records(file: Path, patience: float = 60) -> list[Record]:
    """Returns the records of a finished run; W&B writes the last of them shortly after ``finish()`` returns."""
    end = time.monotonic() + patience
    while not (found := list(records(file))) or not found[-1].HasField("exit"):
        assert time.monotonic() < end, f"{file} is not complete: call finish() first"
        time.sleep(0.1)
    return found


class OfflineRun:
    """The content of an offline run that the tests examine.

    Attributes:
        run: Its ``RunRecord``.
        metrics: Definitions of metrics, by name or by pattern that ends in ``*``.
        history: Logged values as ``{key: value}``, one dictionary per call.
        artifacts: Type of each artifact, and its files as {path in the artifact: file}, by name.
        summary: Last value of each key in the summary.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Any = None
        self.metrics: dict[str, MetricRecord] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: dict[str, tuple[str, dict[str, Path]]] = {}
        self.summary: dict[str, Any] = {}
        for record in finished_records(next(folder.glob("run-*.wandb"))):
            if record.HasField("run"):
                self.run = record.run
            elif record.HasField("metric"):
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif record.HasField("history"):
                self.history.append(_values(record.history.item))
            elif record.HasField("artifact"):
                found = record.artifact
                files = {entry.path: Path(entry.local_path) for entry in found.manifest.contents}
                self.artifacts[found.name] = (found.type, files)
            elif record.HasField("summary"):
                self.summary.update(_values(record.summary.update))

    @property
    def keys(self) -> set[str]:
        """All keys of the history, except those that W&B adds."""
        return {key for step in self.history for key in step if not key.startswith("_")}

    def table(self, key: str) -> dict[str, Any]:
        """Returns columns and data of a table, whose images are dictionaries."""
        path = f"{key}.table.json"
        (file,) = (files[path] for _, files in self.artifacts.values() if path in files)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def definition(self, key: str) -> MetricRecord | None:
        """Returns the definition of a key: its own, or that of the longest pattern that matches."""
        patterns = [p for p in self.metrics if p.endswith("*") and key.startswith(p[:-1])]
        return self.metrics.get(key) or self.metrics.get(max(patterns, key=len, default=""))

    def visible(self) -> set[str]:
        """Returns the keys of numbers that get a panel of their own."""
        numbers = {key for step in self.history for key, value in step.items() if isinstance(value, int | float)}
        found = {key: self.definition(key) for key in numbers & self.keys}
        return {key for key, metric in found.items() if metric is None or not metric.options.hidden}


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Returns the offline runs below a folder, oldest first."""
    return [OfflineRun(path) for path in sorted(folder.rglob("offline-run-*")) if path.is_dir()]


def _values(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = found
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found
