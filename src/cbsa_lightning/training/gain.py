"""Whether the unlabeled images help: estimated from the labeled images alone, by cross-fitting."""

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
"""How often the range over draws held the true gain; measured in docs/unlabeled.md, "How a run estimates the gain"."""
LEAST = 3
"""Labeled positives that a class needs, so that its average precision says anything."""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gain:
    """What the unlabeled images are estimated to bring, in points of average precision (0 to 100).

    Attributes:
        class_names: the C classes.
        positives: ``(C,)``, labeled positives of each.
        by_class: ``(C, 3)``: estimate, lower and upper end of the range over draws of the images; NaN for a class with
            too few positives.
        overall: ``(3,)``, the same for the mean over the other classes.
        images: labeled images it rests on.
        trained_on: labeled images that the networks learned from each time; the others were held out.
    """

    class_names: Sequence[str]
    positives: NDArray[np.int64]
    by_class: Array
    overall: Array
    images: int
    trained_on: int

    @property
    def hurts(self) -> bool:
        """Whether training on the labeled images alone is estimated to be better."""
        return bool(self.overall[0] < 0)

    def sentence(self) -> str:
        """What to tell the user."""
        estimate, low, high = self.overall
        if low > 0:
            verdict = "The unlabeled images help"
        elif high < 0:
            verdict = "The unlabeled images do harm"
        else:
            verdict = f"{self.images} labeled images do not tell for sure whether the unlabeled ones help"
        counted = int(np.isfinite(self.by_class[:, 0]).sum())
        return (
            f"{verdict}: {estimate:+.1f} points of mAP on labeled images held out in turn, with {self.trained_on} of "
            f"{self.images} to learn from; mean of {counted} of {len(self.class_names)} classes. {LEVEL:.0%} of the "
            f"draws of these images give {low:+.1f} to {high:+.1f}; the true gain lay in such a range in {HELD}."
        )

    def save(self, folder: Path) -> None:
        """Writes ``gain.csv``, one row a class, and ``gain.png``."""
        with replacing(folder / "gain.csv") as draft, draft.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "labeled_positives", "gain", "low", "high"])
            for name, number, row in zip(self.class_names, self.positives, self.by_class, strict=True):
                writer.writerow([name, number, *(f"{value:.2f}" for value in row)])
            writer.writerow(["(mean)", "", *(f"{value:.2f}" for value in self.overall)])
        with replacing(folder / "gain.png") as draft:
            self._draw(draft)

    def _draw(self, file: Path) -> None:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state

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
        axes.set_xlabel(f"points of average precision that the unlabeled images bring, {LEVEL:.0%} of draws")
        axes.set_title(f"Estimated on {self.images} labeled images (positives in brackets)", fontsize=10)
        figure.savefig(file, dpi=120)


@dataclass(frozen=True)
class GainCheck:
    """Asks, before a fit, whether the unlabeled images will help.

    The labeled images are dealt into folds. With each fold held out in turn, the module is trained twice from the
    same weights, both times for equally many steps: as it is, and on the labeled images alone. So it costs
    ``2 * folds`` fits more.

    Args:
        folds: how many, at least 2. The arms learn from (folds - 1) / folds of the labeled images, so with few folds
            the estimate is that of a smaller labeled set, where unlabeled images tend to help more.
        keep_labeled_only: whether to train on the labeled images alone if that is estimated to be better.

    Raises:
        ConfigError: for fewer than 2 folds.
    """

    folds: int = 2
    keep_labeled_only: bool = False

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"gain check: the labeled images are dealt into 2 folds or more, got {self.folds}")

    def __call__(self, untrained: SSMLLModule, data: SSMLLDataModule, settings: dict[str, Any]) -> Gain:
        """Estimates the gain; neither ``untrained`` nor ``data`` is changed, and no test image is looked at.

        Args:
            untrained: the module before training.
            data: its data; set up here if it is not.
            settings: arguments of the run's Trainer; logger, checkpoints and callbacks, early stopping among them, are
                left out.

        Raises:
            ConfigError: the module learns from labeled images alone, or the Trainer is not told how many epochs, or
                stops before the last one.
            DataError: no unlabeled images, or too few labeled ones or positives.
        """
        if isinstance(untrained.labeler, LabeledOnly):
            raise ConfigError(
                "gain check: this run trains on the labeled images alone, so there is no gain to estimate. Choose "
                "another labeler, or no gain check."
            )
        if (settings.get("max_epochs") or 0) < 1:
            raise ConfigError("gain check: say for how many epochs the run trains (trainer.max_epochs), 1 or more.")
        data.prepare_data()
        data.setup("fit")
        if not len(data.split.unlabeled):
            raise DataError("gain check: there is no unlabeled image, so nothing to gain. Leave the check out.")
        labels = data.labeled_targets().numpy()
        _told(labels)  # refused now, not after hours
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
    """Tells, at the end of a fit, what was estimated before it: a sentence, ``gain.csv``, ``gain.png``, the loggers.

    Args:
        gain: the estimate.
        trainer: of the fit.
        left_out: whether the unlabeled images were left out because of it.
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
        print("So this run left them out: its weights are those of training on the labeled images alone.")


def gain_of(
    without: Sequence[Array],
    with_: Sequence[Array],
    targets: Sequence[NDArray[np.int64]],
    class_names: Sequence[str],
    trained_on: int,
    seed: int = 0,
) -> Gain:
    """Gain from scores of held-out images, with its range over 1,000 bootstrap draws of the images.

    The scores of each fold come from networks of its own, so they are compared by their rank within it. The range
    holds the chance of which images the networks were measured on, not of which they were trained on, nor of training:
    it is narrower than an interval of the true gain.

    Args:
        without: scores ``(m_f, C)`` of each fold's images without unlabeled images.
        with_: scores of the same images with them.
        targets: ``(m_f, C)`` in {1, 0, -1}.
        class_names: the C names.
        trained_on: labeled images that each network learned from.
        seed: of the draws.

    Raises:
        DataError: no class has enough labeled positives.
    """
    truth = np.concatenate(targets)
    told = _told(truth)
    rng = np.random.default_rng(seed)
    # The first draw is the images themselves, each once.
    draws = np.concatenate(
        [np.ones((1, len(truth))), rng.multinomial(len(truth), [1 / len(truth)] * len(truth), DRAWS)]
    )
    before, after = (np.concatenate([_ranks(fold) for fold in arm]) for arm in (without, with_))
    arms = [[average_precision(scores[:, k], truth[:, k], draws) for k in told] for scores in (before, after)]
    gains = 100 * (np.stack(arms[1]) - np.stack(arms[0]))
    by_class = np.full((len(class_names), 3), np.nan)
    by_class[told] = np.stack([_interval(row) for row in gains])
    drawn = np.isfinite(gains)
    with np.errstate(invalid="ignore"):  # a draw without any positive is left out
        overall = np.where(drawn, gains, 0).sum(0) / drawn.sum(0)
    return Gain(class_names, (truth == 1).sum(0), by_class, _interval(overall), len(truth), trained_on)


def _told(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Classes of which labels ``(m, C)`` are enough to tell anything."""
    told = np.flatnonzero(((labels == 1).sum(0) >= LEAST) & ((labels == 0).sum(0) > 0))
    if not len(told):
        raise DataError(
            f"gain check: no class has {LEAST} labeled positives (and a negative), so nothing can be told from the "
            f"{len(labels)} labeled images. Label more of them, or leave the check out."
        )
    return told


def average_precision(scores: Array, targets: NDArray[np.int64], weights: Array) -> Array:
    """Average precision of one class under many weightings of the images, as scikit-learn defines it.

    Args:
        scores: ``(m,)``; equal ones are one threshold.
        targets: ``(m,)`` in {1, 0, -1}; unknown entries are left out.
        weights: ``(draws, m)``, how often each image counts.

    Returns:
        ``(draws,)``, NaN where no positive is drawn.
    """
    known = targets >= 0
    order = np.argsort(-scores[known], kind="stable")
    scores, positive, weights = scores[known][order], (targets[known] == 1)[order], weights[:, known][:, order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each group of equal scores
    hits = np.cumsum(weights * positive, axis=1)[:, last]
    drawn = np.cumsum(weights, axis=1)[:, last]
    precision = hits / np.maximum(drawn, 1e-12)
    gained = np.diff(hits, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):
        return np.asarray((precision * gained).sum(1) / hits[:, -1])


def deal(labels: NDArray[np.int8], folds: int, seed: int) -> NDArray[np.int64]:
    """Deals images into folds, those with the same rarest label one after another, so that each gets its share.

    Args:
        labels: ``(m, C)`` in {1, 0, -1}.
        folds: how many.
        seed: of the order among images with the same rarest label.

    Returns:
        ``(m,)``, the fold of each image.

    Raises:
        DataError: fewer than two images a fold.
    """
    if len(labels) < 2 * folds:
        raise DataError(f"gain check: {len(labels)} labeled images cannot be dealt into {folds} folds; label more.")
    number = np.where(labels == 1, (labels == 1).sum(0), len(labels) + 1)
    rarest = np.where((labels == 1).any(1), number.argmin(1), labels.shape[1])
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(rarest[shuffled], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


class _KeepScores(L.Callback):
    """The averaged weights' logits of the validation images, from all processes."""

    logits: Array | None = None
    targets: NDArray[np.int64] | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Before the module evaluates and forgets them."""
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
            "gain check: no scores of the last epoch came back. Let the Trainer reach max_epochs (no max_steps or "
            "max_time before it), and use a strategy that trains in this process (ddp, not ddp_spawn)."
        )
    return keep.logits, keep.targets


def _ranks(scores: Array) -> Array:
    """Ranks of each column's scores from 0 to 1, equal scores alike."""
    return np.stack([np.searchsorted(np.sort(c), c) / len(c) for c in scores.T], axis=1)


def _interval(draws: Array) -> Array:
    """The first draw, and the ends of the interval that holds the middle of the others."""
    tails = (1 - LEVEL) / 2
    return np.array([draws[0], *np.nanquantile(draws[1:], [tails, 1 - tails])])
