"""Formatting of a report of ``cbsa check`` as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, TextIO

from cbsa_lightning.data.checks.checking import Counts, Report
from cbsa_lightning.data.checks.findings import Finding, Item
from cbsa_lightning.data.plan import Plan, Stage
from cbsa_lightning.data.splits import PARTS
from cbsa_lightning.errors import listed

SHOWN = 20
"""Maximum number of items of a finding and of classes in the text. JSON contains all of them."""


def text_of(report: Report) -> str:
    """Formats the report as text about the content, the run, the warnings, the errors, and the outcome."""
    warnings, errors = _findings("Warnings", report.warnings), _findings("Errors", report.errors)
    parts = (list(lines) for lines in (_contents(report), _run(report), warnings, errors, [_outcome(report)]))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _contents(report: Report) -> Iterator[str]:
    yield from report.notes
    for name, counts in (("train", report.train), ("test", report.test)):
        if counts is not None:
            yield _images(name, counts)
    if report.class_names:
        classes = listed((f"{name} {count:,}" for name, count in report.fewest_first()), SHOWN)
        yield f"{len(report.class_names):,} classes with their numbers of positives, in ascending order: {classes}."


def write_json(report: Report, stream: TextIO) -> None:
    """Writes the report as one JSON object.

    Its keys are ``ok``, ``notes`` (of the reader), ``classes`` (in ascending order of positives), ``train``, ``test``
    and ``run`` (null if unknown), ``time`` (null if not measured), ``errors`` and ``warnings``. A finding has the keys
    ``kind``, ``message``, ``count`` and ``items``, and an item has the keys ``names`` and ``note``.
    """
    test = report.test.positives if report.test is not None else [None] * len(report.class_names)
    train = report.train
    by_name = {
        name: {"name": name, "positives": positives, "negatives": negatives, "test_positives": tested}
        for name, positives, negatives, tested in zip(
            report.class_names, train.positives if train else (), train.negatives if train else (), test, strict=True
        )
    }
    head = {
        "ok": not report.errors,
        "notes": report.notes,
        "classes": [by_name[name] for name, _ in report.fewest_first()],
        "train": _counts(report.train),
        "test": _counts(report.test),
        "run": _plan(report.plan),
        "time": None if report.time is None else {"seconds": report.time.total, **asdict(report.time)},
    }
    stream.write(json.dumps(head).removesuffix("}"))
    for key, findings in (("errors", report.errors), ("warnings", report.warnings)):
        stream.write(f', "{key}": [')
        for i, finding in enumerate(findings):
            stream.write(", " if i else "")
            _write_finding(finding, stream)
        stream.write("]")
    stream.write("}\n")


def _images(name: str, counts: Counts) -> str:
    text = f"{name}: {counts.images:,} images, {counts.labeled:,} labeled"
    if details := [
        f"{count:,} {what}"
        for count, what in ((counts.empty, "show no class"), (counts.partly, "are partly labeled"))
        if count
    ]:
        text += f" ({', '.join(details)})"
    return f"{text}, {counts.unlabeled:,} unlabeled."


def _run(report: Report) -> Iterator[str]:
    if (plan := report.plan) is None:
        return
    split = plan.split
    yield (
        f"A run trains on {len(split.labeled):,} labeled and {len(split.unlabeled):,} unlabeled images, and "
        f"validates on {plan.validated:,} {plan.validated_on}, with positives of {plan.validated_classes:,} of "
        f"{len(report.class_names):,} classes."
    )
    yield f"  first stage: {_stage(plan.warmup)}"
    yield f"  second stage: {_stage(plan.second)}"
    if report.time is not None:
        yield report.time.sentence()


def _stage(stage: Stage) -> str:
    epochs = (
        "" if stage.epochs is None else f"{stage.epochs:,} epochs = {stage.epochs * stage.steps_per_epoch:,} steps, "
    )
    images = f"{stage.labeled:,} labeled" + (f" and {stage.unlabeled:,} unlabeled" if stage.unlabeled else "")
    return f"{epochs}{stage.steps_per_epoch:,} steps per epoch, {images} images per step"


def _findings(title: str, findings: Sequence[Finding]) -> Iterator[str]:
    if findings:
        yield title
    for finding in findings:
        yield from _finding(finding)


def _outcome(report: Report) -> str:
    if report.errors:
        return "This data set must be corrected before `cbsa fit` (exit status 1)."
    return "Nothing stops `cbsa fit`." if report.warnings else "No faults found."


def _finding(finding: Finding) -> Iterator[str]:
    count = f" ({finding.count:,})" if finding.count else ""
    yield f"  {finding.kind}{count}: {finding.message}"
    for item in islice(finding.items(), SHOWN):
        yield f"    {_item(item)}"
    if finding.count > SHOWN:
        yield f"    ... and {finding.count - SHOWN:,} more; --json lists all"


def _item(item: Item) -> str:
    more = f" and {len(item.names) - 5:,} more" if len(item.names) > 5 else ""
    names = " = ".join(item.names[:5]) + more
    return f"{names} ({item.note})" if item.note else names


def _counts(counts: Counts | None) -> dict[str, int] | None:
    if counts is None:
        return None
    return {name: value for name, value in asdict(counts).items() if name not in ("positives", "negatives")}


def _plan(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        **{part: len(getattr(plan.split, part)) for part in PARTS},
        "validated_on": plan.validated_on,
        "validated": plan.validated,
        "validated_classes": plan.validated_classes,
        "first_stage": asdict(plan.warmup),
        "second_stage": asdict(plan.second),
    }


def _write_finding(finding: Finding, stream: TextIO) -> None:
    """Writes one item at a time, because a million paths would need hundreds of megabytes of memory."""
    head = {"kind": finding.kind, "message": finding.message, "count": finding.count}
    stream.write(json.dumps(head).removesuffix("}") + ', "items": [')
    for i, item in enumerate(finding.items()):
        stream.write((", " if i else "") + json.dumps(item._asdict()))
    stream.write("]}")
