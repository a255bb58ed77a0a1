"""Builds the report page of a run as HTML from its files and its Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from platform import python_version

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from numpy.typing import NDArray

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.io.runs import CONFIG, LABELS, NEXT_TO_LABEL, PICTURES, SUSPICIOUS_LABELS
from cbsa_lightning.reports.page.run_files import read_listing, read_thresholds, read_unlabeled, read_validation
from cbsa_lightning.reports.page.sections import (
    LISTED,
    chosen_classes,
    class_examples,
    class_rows,
    context_sections,
    next_images,
    suspicious_images,
)
from cbsa_lightning.reports.page.summary import next_steps, quality, weak_classes
from cbsa_lightning.reports.page.thumbnails import picture, thumbnail

PACKAGES = ("cbsa-lightning", "torch", "lightning", "open_clip_torch", "numpy")


@dataclass(frozen=True)
class Run:
    """Content of the page that is not in the files of a run.

    Attributes:
        folder: Folder of the run.
        class_names: The C class names.
        root: Folder of the training images.
        counts: Number of images of each kind, as text.
        validation: The validation images with their labels; None if no images were scored.
        baselines: mAP (0 to 1) of each simpler classifier, by name.
        partition: ``(C,)``, context of each class; None without contexts.
        few_images: Number of validation images below which metrics are imprecise.
        changes: Sentences about the changes since the run that training started from.
    """

    folder: Path
    class_names: tuple[str, ...]
    root: Path
    counts: Mapping[str, int] = field(default_factory=dict)
    validation: AnnotationTable | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    partition: NDArray[np.int64] | None = None
    few_images: int = 0
    changes: Sequence[str] = ()


def build_page(run: Run) -> str:
    """Builds the page as HTML. The number of images on the page is limited, regardless of the size of the data set.

    Raises:
        DataError: If the images in ``predictions.csv`` differ from ``run.validation``, or ``labels.csv`` contains a
            class that the run does not have.
    """
    thumbnail.cache_clear()  # the files of an earlier run may have changed
    folder, names = run.folder, run.class_names
    thresholds, labeled = read_thresholds(folder)
    validation = None if run.validation is None else read_validation(folder, run.validation, thresholds)
    rows = class_rows(names, labeled, thresholds, validation)
    chosen = chosen_classes(rows)
    unlabeled = read_unlabeled(folder, names, chosen) if (folder / LABELS).is_file() else None
    if unlabeled is not None:
        rows = [row._replace(given=int(count)) for row, count in zip(rows, unlabeled.counts, strict=True)]
    examples = [class_examples(k, rows[k], validation, unlabeled, run.root) for k in chosen]
    following = read_listing(folder / NEXT_TO_LABEL, LISTED)
    suspicious = read_listing(folder / SUSPICIOUS_LABELS, LISTED)
    config = folder / CONFIG
    return _template().render(
        title=f"{folder.resolve().parent.name}/{folder.resolve().name}",
        counts=run.counts,
        quality=quality(rows, validation, run.baselines, run.few_images),
        weak=weak_classes(rows),
        changes=run.changes,
        next_steps=next_steps(following, suspicious),
        rows=rows,
        curves=_pictures(folder, precision_recall="Precision-recall curves", reliability="Reliability"),
        examples=[example for example in examples if example.kinds],
        next_to_label=following,
        next_images=next_images(following, run.root) if following else [],
        suspicious=suspicious,
        suspicious_images=suspicious_images(suspicious, run.root) if suspicious else [],
        contexts=[] if run.partition is None else context_sections(run.partition, names, validation),
        num_contexts=0 if run.partition is None else len(np.unique(run.partition)),
        training=_pictures(folder, training="Training curves"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        versions={"Python": python_version(), **{name: version(name) for name in PACKAGES}},
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        measured=validation is not None,
        has_unlabeled=unlabeled is not None,
    )


def _pictures(folder: Path, **names: str) -> dict[str, str]:
    """Returns plots of the run as data URIs by title."""
    found = {title: picture(folder / PICTURES / f"{name}.png") for name, title in names.items()}
    return {title: uri for title, uri in found.items() if uri is not None}


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else "never" if np.isinf(value) else f"{100 * value:.1f} %"
