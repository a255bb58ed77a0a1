"""Writes `labels.json` and `preprocess.json`."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cbsa_lightning.checkpoints.portable import LABELS_FILE
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import THRESHOLDS

PREPROCESS_FILE = "preprocess.json"


def threshold_values(thresholds: Tensor) -> list[float | None]:
    """Returns the thresholds for JSON, with None for classes that are never predicted (JSON has no infinity)."""
    return [value if math.isfinite(value) else None for value in thresholds.tolist()]


def class_entries(
    class_names: Sequence[str], prompt_names: Sequence[str], thresholds: Tensor, run: Path | None
) -> list[dict[str, Any]]:
    """Returns an entry for each class: name, prompt, threshold and, with a run, labels, precision and recall.

    Args:
        class_names: The C class names.
        prompt_names: Class names in prompts.
        thresholds: ``(C,)``, decision thresholds.
        run: Folder of the run. Its ``thresholds.csv`` is used if it contains the same thresholds.
    """
    values = threshold_values(thresholds)
    entries = [
        {"name": name, "prompt": prompt, "threshold": value}
        for name, prompt, value in zip(class_names, prompt_names, values, strict=True)
    ]
    measured = [] if run is None else _measured(run / THRESHOLDS)
    if [row["class"] for row in measured] != list(class_names):
        return entries
    if any(not _same(row["threshold"], value) for row, value in zip(measured, values, strict=True)):
        return entries
    for entry, row in zip(entries, measured, strict=True):
        entry |= {
            name: float(text) for name, text in row.items() if name not in ("class", "prompt", "threshold") and text
        }
    return entries


def write_labels_file(folder: Path, entries: Sequence[dict[str, Any]], calibrated: bool) -> None:
    """Writes `labels.json`.

    Raises:
        OutputError: If the file cannot be written.
    """
    _write(folder / LABELS_FILE, {"calibrated": calibrated, "classes": list(entries)})


def write_preprocess_file(folder: Path, image_size: int) -> None:
    """Writes `preprocess.json`, which describes how to preprocess an image file for the model.

    Raises:
        OutputError: If the file cannot be written.
    """
    content = {
        "orientation": "apply the EXIF orientation",
        "color": "RGB",
        "transparency": "on white",
        "size": [image_size, image_size],
        "resize": "squash",  # without keeping the aspect ratio
        "filter": "bilinear",
        "antialias": True,
        "layout": "NCHW",
        "dtype": "uint8",
        "normalization": "none; the model contains it",
    }
    _write(folder / PREPROCESS_FILE, content)


def _write(file: Path, content: Any) -> None:
    with replacing(file) as draft:
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _measured(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _same(text: str, value: float | None) -> bool:
    return math.isclose(float(text or "nan"), math.inf if value is None else value, rel_tol=1e-5)
