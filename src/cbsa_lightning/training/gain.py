"""Estimates by cross-validation on the labeled images whether the unlabeled images help."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.io.files import replacing
from cbsa_lightning.io.runs import folder_of
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.training.module import SSMLLModule

LEVEL = 0.9
DRAWS = 1000
HELD = "17 of 27 measured runs"
"""Runs in which the bootstrap interval contained the true gain.

See "How a run estimates the gain" in docs/explanation/unlabeled.md.
"""
LEAST = 3
"""Number of labeled positives that a class needs for a meaningful average precision."""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gain:
    """Estimated gain from the unlabeled images, in points of average precision (0 to 100).

    Attributes:
        class_names: the C classes.
        positives: ``(C,)``, labeled positives per class.
        by_class: ``(C, 3)``, estimate and lower and upper end of the bootstrap interval; NaN for a class with too few
            positives.
        overall: ``(3,)``, the same for the mean over the remaining classes.
        images: number of labeled images that the estimate is based on.
        trained_on: number of labeled images in each training fold.
    """

    class_names: Sequence[str]
    positives: NDArray[np.int64]
    by_class: Array
    overall: Array
    images: int
    trained_on: int

    @property
    def hurts(self) -> bool:
        """Whether training on labeled images only is better according to the estimate."""
        return bool(self.overall[0] < 0)

    def sentence(self) -> str:
        """Returns the estimate as a sentence for the user."""
        estimate, low, high = self.overall
        if low > 0:
            verdict = "The unlabeled images help"
        elif high < 0:
            verdict = "The unlabeled images hurt"
        else:
            verdict = f"{self.images} labeled images are too few to tell whether the unlabeled images help"
        counted = int(np.isfinite(self.by_class[:, 0]).sum())
        return (
            f"{verdict}: {estimate:+.1f} points of mAP in cross-validation, training on {self.trained_on} of "
            f"{self.images} labeled images; mean of {counted} of {len(self.class_names)} classes. {LEVEL:.0%} "
            f"bootstrap interval: {low:+.1f} to {high:+.1f}; such intervals contained the true gain in {HELD}."
        )

    def save(self, folder: Path) -> None:
        """Writes ``gain.csv``, with one row per class, and ``gain.png``."""
        with replacing(folder / "gain.csv") as draft, draft.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "labeled_positives", "gain", "low", "high"])
            for name, number, row in zip(self.class_names, self.positives, self.by_class, strict=True):
                writer.writerow([name, number, *(f"{value:.2f}" for value in row)])
            writer.writerow(["(mean)", "", *(f"{value:.2f}" for value in self.overall)])
        with replacing(folder / "gain.png") as draft:
            self._draw(draft)

    def _draw(self, file: Path) -> None:
        from matplotlib.figure import Figure  # unlike pyplot, it needs no display and has no global state

        told = np.flatnonzero(np.isfinite(self.by_class[:, 0]))
        told = told[np.argsort(self.by_class[told, 0])]
        names = [f"{self.class_names[k]} ({self.positives[k]})" for k in told.tolist()]
        rows = np.concatenate([self.overall[None], self.by_class[told]])
        figure = Figure(figsize=(7, 1.2 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(rows))
        colors = ["tab:green" if value > 0 else "tab:red" for value in rows[:, 0]]
        axes.hlines(places, rows[:, 1], rows[:, 2], color=colors, linewidth=[4, *[1.5] * len(told)])
        axes.scatter(rows[:, 0], places, color=colors, s=[60, *[25] * len(told)], zorder=3)
        axes.set_yticks(places, ["mean", *names])
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_xlabel(f"gain in average precision from unlabeled images (points), {LEVEL:.0%} bootstrap interval")
        axes.set_title(f"Estimated on {self.images} labeled images (number of positives in parentheses)", fontsize=10)
        figure.savefig(file, dpi=120)


@dataclass(frozen=True)
class GainCheck:
    """Estimates, before a fit, whether the unlabeled images will help.

    The labeled images are split into folds. For each held-out fold, the module is trained twice from the same weights
    for the same number of steps: once with the settings of the run, and once on labeled images only. The check
    therefore takes ``2 * folds`` extra fits.

    Args:
        folds: number of folds, at least 2. The networks are trained on (folds - 1) / folds of the labeled images. With
            few folds, the estimate therefore applies to a smaller labeled set, for which unlabeled images tend to help
            more.
        keep_labeled_only: whether to train on labeled images only if this is better according to the estimate.

    Raises:
        ConfigError: If there are fewer than 2 folds.
    """

    folds: int = 2
    keep_labeled_only: bool = False

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"gain check: there must be at least 2 folds, got {self.folds}")

    def __call__(self, untrained: SSMLLModule, data: SSMLLDataModule, settings: dict[str, Any]) -> Gain:
        """Estimates the gain. Does not change ``untrained`` or ``data``, and does not use test images.

        Args:
            untrained: the module before training.
            data: the data of the run, which is set up here if necessary.
            settings: arguments of the run's Trainer; logger, checkpoints and callbacks (including early stopping) are
                ignored.

        Raises:
            ConfigError: If the module trains on labeled images only, the Trainer has no ``max_epochs``, or it stops
                before the last epoch.
            DataError: If there are no unlabeled images, or too few labeled images or positives.
        """
        if isinstance(untrained.labeler, LabeledOnly):
            raise ConfigError(
                "gain check: this run trains on labeled images only, so there is no gain to estimate. Choose "
                "another labeler, or disable the gain check."
            )
        if (settings.get("max_epochs") or 0) < 1:
            raise ConfigError("gain check: set trainer.max_epochs to 1 or more.")
        data.prepare_data()
        data.setup("fit")
        if not len(data.split.unlabeled):
            raise DataError("gain check: there are no unlabeled images. Disable the check.")
        labels = data.labeled_targets().numpy()
        _told(labels)  # raises an error now instead of after hours of training
        fold_of = deal(labels, self.folds, data.seed)
        hidden = getattr(rank_zero_only, "rank", 0) != 0
        with tqdm(total=2 * self.folds, desc="Do unlabeled images help?", unit="fit", disable=hidden) as bar:
            arms: list[list[Array]] = [[], []]
            truths: list[NDArray[np.int64]] = []
            for fold in range(self.folds):
                part = data.with_held_out(np.flatnonzero(fold_of == fold))
                for arm, scores in enumerate(arms):
                    module = copy.deepcopy(untrained)
                    module.tells_limits = False
                    if arm == 0:
                        module.labeler = LabeledOnly()
                    logits, targets = _held_out_scores(module, part, settings)
                    scores.append(logits)
                    bar.update()
                truths.append(targets)
        trained_on = len(labels) - int(np.bincount(fold_of).max())
        return gain_of(arms[0], arms[1], truths, data.class_names, trained_on, data.seed)


def report_gain(gain: Gain, trainer: L.Trainer, left_out: bool = False) -> None:
    """Reports the estimate at the end of a fit: prints a sentence, writes ``gain.csv`` and ``gain.png``, and logs it.

    Args:
        gain: the estimate.
        trainer: the Trainer of the fit.
        left_out: whether the run did not use the unlabeled images because of this estimate.
    """
    folder = folder_of(trainer)
    if folder is None or not trainer.is_global_zero:
        return
    gain.save(folder)
    names = ("estimate", "low", "high")
    values = {f"gain/{name}": float(value) for name, value in zip(names, gain.overall, strict=True)}
    by_class = zip(gain.class_names, gain.by_class[:, 0].tolist(), strict=True)
    values |= {f"gain/AP/{name}": value for name, value in by_class if np.isfinite(value)}
    for logger in trainer.loggers:
        logger.log_metrics(values)
        logger.save()
    print(gain.sentence())
    if left_out:
        print("This run therefore did not use them and was trained on labeled images only.")


def gain_of(
    without: Sequence[Array],
    with_: Sequence[Array],
    targets: Sequence[NDArray[np.int64]],
    class_names: Sequence[str],
    trained_on: int,
    seed: int = 0,
) -> Gain:
    """Computes the gain from held-out scores, with an interval over 1,000 bootstrap draws of the images.

    Each fold is scored by different networks, so scores are compared by their rank within the fold. The interval covers
    the sampling of the images that are scored, but not the sampling of the training images or the randomness of
    training. It is therefore narrower than a confidence interval of the true gain.

    Args:
        without: scores ``(m_f, C)`` of each fold's images from training without unlabeled images.
        with_: scores of the same images from training with unlabeled images.
        targets: ``(m_f, C)`` in {1, 0, -1}.
        class_names: the C names.
        trained_on: number of labeled images in each training fold.
        seed: seed of the draws.

    Raises:
        DataError: If no class has enough labeled positives.
    """
    truth = np.concatenate(targets)
    told = _told(truth)
    rng = np.random.default_rng(seed)
    # The first draw is the original sample, which contains each image once.
    draws = np.concatenate(
        [np.ones((1, len(truth))), rng.multinomial(len(truth), [1 / len(truth)] * len(truth), DRAWS)]
    )
    before, after = (np.concatenate([_ranks(fold) for fold in arm]) for arm in (without, with_))
    arms = [[average_precision(scores[:, k], truth[:, k], draws) for k in told] for scores in (before, after)]
    gains = 100 * (np.stack(arms[1]) - np.stack(arms[0]))
    by_class = np.full((len(class_names), 3), np.nan)
    by_class[told] = np.stack([_interval(row) for row in gains])
    drawn = np.isfinite(gains)
    with np.errstate(invalid="ignore"):  # draws without a positive are ignored
        overall = np.where(drawn, gains, 0).sum(0) / drawn.sum(0)
    return Gain(class_names, (truth == 1).sum(0), by_class, _interval(overall), len(truth), trained_on)


def _told(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the classes that have enough labels in ``labels (m, C)`` for an estimate."""
    told = np.flatnonzero(((labels == 1).sum(0) >= LEAST) & ((labels == 0).sum(0) > 0))
    if not len(told):
        raise DataError(
            f"gain check: no class has {LEAST} labeled positives (and a negative), so the gain cannot be estimated "
            f"from {len(labels)} labeled images. Label more images, or disable the check."
        )
    return told


def average_precision(scores: Array, targets: NDArray[np.int64], weights: Array) -> Array:
    """Computes the average precision of one class for several weightings of the images, as defined by scikit-learn.

    Args:
        scores: ``(m,)``; equal scores form one threshold.
        targets: ``(m,)`` in {1, 0, -1}; unknown entries are ignored.
        weights: ``(draws, m)``, weight of each image.

    Returns:
        ``(draws,)``, NaN if no positive is drawn.
    """
    known = targets >= 0
    order = np.argsort(-scores[known], kind="stable")
    scores, positive, weights = scores[known][order], (targets[known] == 1)[order], weights[:, known][:, order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # last of each group of equal scores
    hits = np.cumsum(weights * positive, axis=1)[:, last]
    drawn = np.cumsum(weights, axis=1)[:, last]
    precision = hits / np.maximum(drawn, 1e-12)
    gained = np.diff(hits, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):
        return np.asarray((precision * gained).sum(1) / hits[:, -1])


def deal(labels: NDArray[np.int8], folds: int, seed: int) -> NDArray[np.int64]:
    """Assigns images to folds, stratified by each image's rarest label.

    Args:
        labels: ``(m, C)`` in {1, 0, -1}.
        folds: number of folds.
        seed: seed of the order among images with the same rarest label.

    Returns:
        ``(m,)``, the fold of each image.

    Raises:
        DataError: If there are fewer than two images per fold.
    """
    if len(labels) < 2 * folds:
        raise DataError(f"gain check: {len(labels)} labeled images cannot form {folds} folds. Label more images.")
    number = np.where(labels == 1, (labels == 1).sum(0), len(labels) + 1)
    rarest = np.where((labels == 1).any(1), number.argmin(1), labels.shape[1])
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(rarest[shuffled], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


class _KeepScores(L.Callback):
    """Keeps the logits of the validation images from all processes, computed with the averaged weights."""

    logits: Array | None = None
    targets: NDArray[np.int64] | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keeps the logits before the module evaluates and resets them."""
        logits, targets = pl_module.metrics["ema"].gathered()
        self.logits, self.targets = logits.double().numpy(), targets.long().numpy()


def _held_out_scores(
    module: SSMLLModule, data: SSMLLDataModule, settings: dict[str, Any]
) -> tuple[Array, NDArray[np.int64]]:
    keep = _KeepScores()
    own = {
        "callbacks": [keep],
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "check_val_every_n_epoch": settings["max_epochs"],
        "val_check_interval": 1.0,
        "limit_val_batches": 1.0,
    }
    L.Trainer(**{**settings, **own}).fit(module, datamodule=data)
    if keep.logits is None or keep.targets is None:
        raise ConfigError(
            "gain check: the last epoch has no scores. Let the Trainer reach max_epochs (no max_steps or "
            "max_time before it), and use a strategy that trains in this process (ddp, not ddp_spawn)."
        )
    return keep.logits, keep.targets


def _ranks(scores: Array) -> Array:
    """Ranks each column's scores from 0 to 1; equal scores get equal ranks."""
    return np.stack([np.searchsorted(np.sort(c), c) / len(c) for c in scores.T], axis=1)


def _interval(draws: Array) -> Array:
    """Returns the first draw and the ends of the central interval of the other draws."""
    tails = (1 - LEVEL) / 2
    return np.array([draws[0], *np.nanquantile(draws[1:], [tails, 1 - tails])])
