"""Estimate of the duration of a run on this machine, for `cbsa check --time`.

The images, views and steps of a run are counted, and each count is multiplied by the measured time per unit.
:mod:`~cbsa_lightning.reproduce.unit_times` measures these times in a separate process, so that this module does not
need torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import yaml

from cbsa_lightning.data.needed_views import needed_views
from cbsa_lightning.data.plan import Plan
from cbsa_lightning.errors import CBSAError, ConfigError

IMAGES, STEPS = 8, 3


@dataclass(frozen=True)
class Request:
    """Specification of the measurements.

    Attributes:
        recipe: Configuration of the run.
        rows: Rows of the training table whose images are read for the measurement.
        sizes: Number of images per training step in each stage.
        steps: Number of training steps to time for each of these sizes.
    """

    recipe: dict[str, Any]
    rows: list[int]
    sizes: list[int]
    steps: int = STEPS


@dataclass(frozen=True)
class Units:
    """Measured seconds per image, view or step, and properties of a run that affect its duration.

    Attributes:
        trains: Whether the network has trainable weights.
        frozen: Whether the network has a frozen image tower.
        cached: Whether features of this tower are cached.
        strong_views: Number of cached strong views per training image. With 0, the tower runs in each training step.
        evidence: Whether frozen descriptions of the training images are computed before training.
        labels_once: Whether training does not depend on the scores of unlabeled images in each epoch.
        warmup_epochs: Number of epochs of the first stage.
        max_epochs: Number of epochs of both stages, or negative if unlimited.
        validated_every: Number of epochs from one validation to the next.
        loaders: Number of loader workers.
        overlaps: Whether images are read while the device computes.
        images: Number of images that were read for the measurement.
        steps: Number of training steps that were measured for each size.
        read: Seconds to decode an image.
        plain: Seconds to compute its plain view.
        strong: Seconds to compute its strong view.
        tower: Seconds of the frozen tower per view.
        head: Seconds of all layers after the tower per image, with one set of weights.
        step: Seconds of a training step for each number of images.
    """

    trains: bool
    frozen: bool
    cached: bool
    strong_views: int
    evidence: bool
    labels_once: bool
    warmup_epochs: int
    max_epochs: int
    validated_every: int
    loaders: int
    overlaps: bool
    images: int
    steps: int
    read: float
    plain: float
    strong: float
    tower: float
    head: float
    step: dict[int, float]

    def together(self, computing: float, loading: float) -> float:
        """Returns the seconds of computing and loading, which either overlap or share the processor."""
        loading /= self.loaders
        return max(computing, loading) if self.overlaps else computing + loading


@dataclass(frozen=True)
class RunTime:
    """Estimated duration of a run, in seconds for each part.

    Attributes:
        features: Seconds to compute the cached features before training.
        steps: Seconds of the training steps.
        passes: Seconds to score images for validation, thresholds and labels, and to describe them before training.
        views: Number of views whose features are cached.
        training_steps: Number of training steps in both stages.
        scored: Number of times that an image is scored or described.
        measured_images: Number of images that were measured for the estimate.
        measured_steps: Number of training steps that were measured for the estimate.
        not_included: Parts of a run that the estimate does not include.
    """

    features: float
    steps: float
    passes: float
    views: int
    training_steps: int
    scored: int
    measured_images: int
    measured_steps: int
    not_included: tuple[str, ...]

    @property
    def total(self) -> float:
        """Total number of seconds."""
        return self.features + self.steps + self.passes

    def sentence(self) -> str:
        """Returns the estimate as a sentence."""
        parts = [
            (self.features, f"the features of {self.views:,} views", self.views),
            (self.steps, f"{self.training_steps:,} training steps", self.training_steps),
            (self.passes, f"{self.scored:,} images in validations and other passes", self.scored),
        ]
        told = ", ".join(f"{_duration(seconds)} for {what}" for seconds, what, number in parts if number)
        measured = f"{self.measured_images} images"
        measured += f" and {self.measured_steps} steps" if self.measured_steps else ""
        *others, last = self.not_included
        excluded = f"{', '.join(others)}{',' if len(others) > 1 else ''} and {last}" if others else last
        return (
            f"A run takes about {_duration(self.total)} here: {told} (measured on {measured}). The estimate excludes "
            f"{excluded}."
        )


def run_time(recipe: dict[str, Any], plan: Plan) -> RunTime:
    """Measures the parts of a run on this machine and estimates its total time.

    Args:
        recipe: Configuration of the run, with a model.
        plan: Plan of the run.

    Raises:
        ConfigError: If the configuration has no model or no number of epochs.
        CBSAError: If the parts could not be measured. The message contains the reason.
    """
    if not isinstance(recipe.get("model"), dict):
        raise ConfigError(
            "--time requires a configuration with a model. Give one before the configuration of the data set: cbsa "
            "check photos.yaml mine.yaml --time."
        )
    used = np.concatenate([plan.split.labeled, plan.split.unlabeled])
    rows = used[np.linspace(0, len(used) - 1, min(IMAGES, len(used))).astype(int)]
    sizes = [stage.labeled + stage.unlabeled for stage in (plan.warmup, plan.second)]
    units = _measured(Request(recipe, rows.tolist(), sizes))
    if units.max_epochs < 0:
        raise ConfigError("--time requires the number of epochs; set trainer.max_epochs.")
    found = estimate(plan, units)
    more = {"compare": "the comparison (compare)", "gain": "the gain check (gain)"}
    return replace(
        found, not_included=(*found.not_included, *(text for name, text in more.items() if recipe.get(name)))
    )


def _measured(request: Request) -> Units:
    command = [sys.executable, "-m", "cbsa_lightning.reproduce.unit_times"]
    given = yaml.safe_dump(asdict(request))
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    if done.returncode:
        raise CBSAError(f"The time of a run could not be measured:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise ConfigError(f"The time of a run could not be measured: {found['refused']}")
    return Units(**{**found, "step": {int(size): seconds for size, seconds in found["step"].items()}})


def estimate(plan: Plan, units: Units) -> RunTime:
    """Estimates the duration of a run from its counts and the seconds per unit.

    Args:
        plan: Plan of the run.
        units: Seconds per unit, and the number of epochs.
    """
    views, reading = kept_views(plan, units) if units.cached else (0, 0.0)
    warmup = min(units.warmup_epochs, units.max_epochs)
    computing = loading = 0.0
    training_steps = 0
    for stage, epochs in ((plan.warmup, warmup), (plan.second, units.max_epochs - warmup)):
        steps, size = stage.steps_per_epoch * epochs, stage.labeled + stage.unlabeled
        if units.trains and steps:
            training_steps += steps
            computing += steps * units.step[size]
            loading += 0 if units.strong_views else steps * size * (units.read + units.strong)
    scored, heads = scored_images(plan, units)
    # A run that uses only labels does not cache features of unlabeled images, but still writes labels for them.
    unkept = 0 if plan.second.unlabeled else len(plan.split.unlabeled)
    towers = unkept if units.cached else scored
    return RunTime(
        features=units.together(views * units.tower, reading),
        steps=units.together(computing, loading),
        passes=units.together(towers * units.tower + heads * units.head, towers * (units.read + units.plain)),
        views=views,
        training_steps=training_steps,
        scored=scored,
        measured_images=units.images,
        measured_steps=units.steps if training_steps else 0,
        not_included=("startup", "writing the report", *(["fitting the probes"] if units.evidence else [])),
    )


def kept_views(plan: Plan, units: Units) -> tuple[int, float]:
    """Returns the number of views in a feature cache, and the seconds that one process needs to compute them."""
    alone = not plan.second.unlabeled and not len(plan.partly)
    needed = needed_views(plan.split, plan.images, plan.partly, units.strong_views, alone)
    images = int(needed.any(1).sum()) + plan.test_images
    strong = int(needed[:, 2:].sum())
    views = int(needed.sum()) + plan.test_images
    return views, images * (units.read + units.plain) + strong * units.strong


def scored_images(plan: Plan, units: Units) -> tuple[int, int]:
    """Returns how many images are scored or described without gradients, and how many times images are scored.

    After the warm-up, validation scores each image with both the averaged and the raw weights, which the second number
    counts separately.
    """
    labeled, unlabeled = len(plan.split.labeled), len(plan.split.unlabeled)
    last = units.max_epochs - 1
    validated = [epoch for epoch in range(last + 1) if epoch == last or not (epoch + 1) % units.validated_every]
    described = plan.validated * units.frozen + (labeled + unlabeled) * units.evidence
    at_the_end = plan.validated + unlabeled  # for predictions.csv and labels.csv
    thresholds = (unlabeled + len(plan.partly)) * sum(1 for _ in _threshold_passes(plan, units, validated))
    scored = plan.validated * len(validated) + thresholds + described + at_the_end
    return scored, scored + plan.validated * sum(epoch >= units.warmup_epochs for epoch in validated)


def _threshold_passes(plan: Plan, units: Units, validated: list[int]) -> Iterator[int]:
    """Yields the epochs that start by scoring the unlabeled images; see :class:`UpdateThresholds`."""
    first, last = units.warmup_epochs, units.max_epochs
    if not (plan.second.unlabeled or len(plan.partly)) or first >= last:
        return
    yield first
    for epoch in range(first + 1, last + 1):
        if not units.labels_once or epoch - 1 in validated or epoch == last:
            yield epoch


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * 60 else f"{seconds / 3600:.1f} h"
