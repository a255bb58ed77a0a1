"""Writes the first paragraphs of the page: the quality of the model, its weak classes, and next steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cbsa_lightning.io.runs import NEXT_TO_LABEL, SUSPICIOUS_LABELS
from cbsa_lightning.reports.page.run_files import Listing, Validation
from cbsa_lightning.reports.page.sections import ClassRow

LOW_AP = 0.5
FEW_POSITIVES = 10
_NAMED = 5  # maximum number of classes in a sentence


def quality(rows: Sequence[ClassRow], validation: Validation | None, baselines: Mapping[str, float], few: int) -> str:
    """Describes the quality of the model.

    Args:
        rows: Rows of the table of classes.
        validation: The validation images; None if no images were scored.
        baselines: mAP (0 to 1) of each simpler classifier, by name.
        few: Number of validation images below which metrics are imprecise.
    """
    if validation is None:
        return "There are no validation images, so the quality of the model is unknown."
    count = len(validation.table)
    known = [row.AP for row in rows if row.AP is not None and not np.isnan(row.AP)]
    if not known:
        return f"None of the {count:,} validation images shows any class, so the quality of the model is unknown."
    text = (
        f"On {count:,} validation images, not used for training, the model has a mean average precision (mAP) "
        f"of {_percent(np.mean(known))}. mAP measures how well images with a class are ranked above images without it. "
        "100 % is perfect. "
    )
    if baselines:
        text += f"For comparison: {_listed([f'{name} has {_percent(value)}' for name, value in baselines.items()])}. "
        best = max(baselines, key=lambda name: baselines[name])
        if baselines[best] > np.mean(known):
            text += f"On these images, {best} is better than this model. "
    truth, given = validation.table.labels, validation.given
    hits = int((given & (truth == 1)).sum())
    text += (
        f"At the decision thresholds, {_percent(hits / max(int((given & (truth >= 0)).sum()), 1))} of the labels that "
        f"the model predicts are correct (precision), and it finds {_percent(hits / int((truth == 1).sum()))} of the "
        "labels that are present (recall)."
    )
    if count < few:
        text += f" With only {count} images, differences of several points may be due to chance."
    return text


def weak_classes(rows: Sequence[ClassRow]) -> list[str]:
    """Returns sentences about the classes for which the model is poor or its quality is unknown."""
    low = sorted((r for r in rows if r.AP is not None and r.AP < LOW_AP), key=lambda row: row.AP or 0.0)
    scarce = sorted((r for r in rows if r.labeled < FEW_POSITIVES), key=lambda row: row.labeled)
    unmeasured = [row.name for row in rows if row.validation == 0]
    found = []
    if low:
        names = [f"{row.name} ({_percent(row.AP or 0.0)})" for row in low]
        found.append(f"Do not rely on classes with an average precision (AP) below {_percent(LOW_AP)}: {_some(names)}.")
    if scarce:
        names = [f"{row.name} ({row.labeled})" for row in scarce]
        found.append(f"Fewer than {FEW_POSITIVES} labeled images show {_some(names)}.")
    if unmeasured:
        found.append(f"No validation image shows {_some(unmeasured, 'or')}, so their quality is unknown.")
    return found


def next_steps(next_to_label: Listing | None, suspicious: Listing | None) -> str:
    """Describes the next steps, or returns an empty string if there are none."""
    steps = []
    if next_to_label is not None and next_to_label.total:
        steps.append(
            f"label the {_counted(next_to_label.total, 'image')} in {NEXT_TO_LABEL}, whose labels would be most useful"
        )
    if suspicious is not None and suspicious.total:
        steps.append(
            f"check the {_counted(suspicious.total, 'existing label')} in {SUSPICIOUS_LABELS} that may be wrong, "
            "starting with the first"
        )
    return f"Next, {', and '.join(steps)}; then run the same command with the new labels." if steps else ""


def _percent(value: float | np.floating) -> str:
    return f"{100 * value:.0f} %"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str], last: str = "and") -> str:
    rest = len(names) - _NAMED
    return _listed([*names[:_NAMED], f"{rest:,} more"] if rest > 0 else names, last)


def _listed(names: Sequence[str], last: str = "and") -> str:
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else names[0]
