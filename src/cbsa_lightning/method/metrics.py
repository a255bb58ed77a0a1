"""Metrics: average precision, F1, and the quality of pseudo-labels. All values are fractions, not percent."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision, binary_calibration_error
from torchmetrics.utilities import dim_zero_cat

from cbsa_lightning.errors import ConfigError, DataError, listed

REPORTED = ("mAP_with_zeros", "mAP_envelope", "CF1", "OF1", "CF1_at_half", "OF1_at_half", "ECE", "Brier")
"""Metrics of a :class:`MultilabelReport` that are logged in addition to mAP and the average precision of each class."""


def mean_pairwise_cosine(features: Tensor) -> Tensor:
    """Returns the mean cosine ``(B,)`` over all pairs of an image's C label features ``(B, C, d)``; NaN if C is 1."""
    unit = torch.nn.functional.normalize(features.detach().float(), dim=-1)
    count = unit.shape[1]
    # The squared norm of the sum contains each pair twice, plus C ones.
    return (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (count * (count - 1) or float("nan"))


class MultilabelReport(Metric):
    """Evaluates a multi-label classifier exactly, over any number of batches and processes.

    The report contains the non-interpolated average precision of each class over the entries whose true label is known.
    As in torchmetrics and scikit-learn, equal scores form one threshold. Images are ranked by float32 logits, because a
    sigmoid in float32 maps all logits above about 17 to the same value.

    ``compute`` returns a dict:

    - ``AP`` ``(C,)``: average precision; NaN for a class with fewer than ``min_positives`` positives, and for a class
      with unknown entries and no known negative, since any order of its images would have an AP of 1;
    - ``mAP``: mean over the other classes; NaN if there are none;
    - ``mAP_with_zeros``: mean over all C classes, with 0 for a class without positives (the convention of CAP and of
      torchmetrics' macro average);
    - ``mAP_envelope``: like ``mAP``, but with the area under the precision envelope (the highest precision at the same
      or a higher recall). This is the interpolated AP of VOC 2010 and of the conventional systems of Table 5, and it is
      never lower than ``mAP``;
    - ``precision``, ``recall`` ``(C,)``: at the decision ``thresholds``; an undefined ratio is 0;
    - ``support`` ``(C,)``: number of positives;
    - ``CF1``, ``OF1``: harmonic means of class-averaged and of pooled precision and recall, over all C
      classes;
    - ``CF1_at_half``, ``OF1_at_half``: F1 at probability 0.5 (logit >= 0) for all classes, the convention of the
      paper;
    - ``ECE``: expected calibration error of the probabilities, in 15 equal bins over all known entries;
    - ``Brier``: mean squared error of the probabilities;
    - ``num_classes_used``: number of classes that ``mAP`` averages.

    Args:
        num_classes: C, at least 1.
        min_positives: number of positives that a class needs to be included in ``mAP``, >= 1.

    Attributes:
        thresholds: ``(C,)``, decision thresholds on the probabilities. If None, all thresholds are 0.5.

    Raises:
        ConfigError: If an argument is below 1.
    """

    full_state_update = False
    is_differentiable = False
    entries: list[Tensor]

    def __init__(self, num_classes: int, min_positives: int = 1) -> None:
        if num_classes < 1 or min_positives < 1:
            raise ConfigError(
                f"num_classes and min_positives must be at least 1, got {num_classes} and {min_positives}"
            )
        super().__init__()
        self.num_classes = num_classes
        self.min_positives = min_positives
        self._thresholds: Tensor | None = None
        # A flat float32 state can be gathered even if a process has no images. torchmetrics does not support this for
        # matrices or integers.
        self.add_state("entries", default=[], dist_reduce_fx="cat")

    @property
    def thresholds(self) -> Tensor | None:
        """Decision thresholds; see the docstring of the class."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Tensor | None) -> None:
        self._thresholds = values
        self._computed = None  # otherwise torchmetrics returns the cached report

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: ``(B, C)`` scores before the sigmoid, any floating type; stored as float32.
            targets: ``(B, C)`` in {1, 0, -1 unknown}, any integer type.

        Raises:
            DataError: If shapes do not fit, or a logit is not finite.
        """
        expected = (len(logits), self.num_classes)
        if logits.shape != expected or targets.shape != expected:
            raise DataError(
                f"report over {self.num_classes} classes: logits {tuple(logits.shape)} and "
                f"targets {tuple(targets.shape)} must both be (B, {self.num_classes})"
            )
        wrong = ~torch.isfinite(logits)
        if wrong.any():
            where = [f"({i}, {k})" for i, k in wrong.nonzero().tolist()]
            raise DataError(
                f"{len(where)} of {logits.numel()} logits are not finite, at (image of the batch, class) "
                f"{listed(where)}; training has diverged, or the scores overflow half precision"
            )
        self.entries.append(torch.stack([logits.detach().float(), targets.detach().float()]).movedim(0, -1).flatten())

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Returns the logits and targets ``(n, C)`` that all processes have added, as float32 on the CPU."""
        with self.sync_context():
            return self._unpacked()

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        entries = dim_zero_cat(self.entries) if len(self.entries) > 0 else torch.empty(0)
        logits, targets = entries.cpu().view(-1, self.num_classes, 2).unbind(dim=-1)
        return logits, targets

    def compute(self) -> dict[str, Tensor]:
        """Computes the report over all batches added so far; see the docstring of the class."""
        logits, targets = self._unpacked()
        if not len(logits):
            raise DataError("report: no batch was added before compute()")
        positives = (targets == 1).sum(dim=0)
        told = ((targets == 0).any(dim=0) | (targets >= 0).all(dim=0)) & (positives > 0)
        ap, envelope = torch.zeros(2, self.num_classes).float()
        for k in told.nonzero()[:, 0].tolist():
            known = targets[:, k] >= 0
            ap[k] = _average_precision(logits[known, k], targets[known, k])
            envelope[k] = _envelope_precision(logits[known, k], targets[known, k])
        used = told & (positives >= self.min_positives)
        half = _Counts((logits >= 0).to(torch.int8), targets)
        # Prediction compares probabilities with the thresholds, so the report does the same.
        given = logits >= 0 if self.thresholds is None else logits.sigmoid() >= self.thresholds.cpu()
        counts = _Counts(given.to(torch.int8), targets)
        report = {
            "AP": torch.where(used, ap, torch.nan),
            "mAP": ap[used].mean(),
            "mAP_with_zeros": ap.mean(),
            "mAP_envelope": envelope[used].mean(),
            "precision": counts.class_precision,
            "recall": counts.class_recall,
            "support": counts.actual,
            "CF1": counts.cf1,
            "OF1": counts.of1,
            "CF1_at_half": half.cf1,
            "OF1_at_half": half.of1,
            **_calibration(logits, targets),
            "num_classes_used": used.sum(),
        }
        return {name: value.to(self.device) for name, value in report.items()}


def _calibration(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    known = targets >= 0
    if not known.any():
        return dict.fromkeys(("ECE", "Brier"), torch.tensor(torch.nan))
    scores, truth = logits[known].sigmoid(), targets[known].long()
    return {
        "ECE": binary_calibration_error(scores, truth, n_bins=15),
        "Brier": (scores - truth).square().mean(),
    }


def pseudo_label_quality(pseudo: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Compares pseudo-labels with true labels that training does not use (Fig. 6 of the paper).

    Entries whose true label is unknown are excluded, except from ``coverage``, which does not depend on true labels. An
    ignored entry (-1) does not count as a prediction; if its true label is positive, it lowers recall. An undefined
    ratio (of a class that is never predicted or has no positives) is 0.

    Args:
        pseudo: ``(n, C)`` in {1, 0, -1 ignored}.
        truth: ``(n, C)`` in {1, 0, -1 unknown}.

    Returns:
        ``precision`` and ``recall``: means over classes (CP, CR); ``CF1``: their harmonic mean; ``OF1``: the
        harmonic mean of pooled precision and recall; ``coverage``: fraction of all entries that are not ignored;
        ``class_precision``, ``class_recall``, ``positive_rate`` ``(C,)``: per class; the last is the fraction of
        images with a positive pseudo-label. Float32 on the CPU.

    Raises:
        DataError: If the shapes differ or are not (n, C).
    """
    if pseudo.ndim != 2 or pseudo.shape != truth.shape:
        raise DataError(f"pseudo-labels {tuple(pseudo.shape)} and truth {tuple(truth.shape)} must both be (n, C)")
    pseudo, truth = pseudo.cpu(), truth.cpu()
    counts = _Counts(pseudo, truth)
    known = (truth >= 0).sum(dim=0)
    return {
        "precision": counts.class_precision.mean(),
        "recall": counts.class_recall.mean(),
        "CF1": counts.cf1,
        "OF1": counts.of1,
        "coverage": _ratio((pseudo >= 0).sum(), torch.tensor(pseudo.numel())),
        "class_precision": counts.class_precision,
        "class_recall": counts.class_recall,
        "positive_rate": _ratio(counts.predicted, known),
    }


class _Counts:
    """Counts of hits, predicted positives and actual positives per class, over entries whose true label is known."""

    def __init__(self, predicted: Tensor, truth: Tensor) -> None:
        self.hits = ((predicted == 1) & (truth == 1)).sum(dim=0)
        self.predicted = ((predicted == 1) & (truth >= 0)).sum(dim=0)
        self.actual = (truth == 1).sum(dim=0)
        self.class_precision = _ratio(self.hits, self.predicted)
        self.class_recall = _ratio(self.hits, self.actual)

    @property
    def cf1(self) -> Tensor:
        return _harmonic(self.class_precision.mean(), self.class_recall.mean())

    @property
    def of1(self) -> Tensor:
        hits = self.hits.sum()
        return _harmonic(_ratio(hits, self.predicted.sum()), _ratio(hits, self.actual.sum()))


def _average_precision(logits: Tensor, targets: Tensor) -> Tensor:
    # torchmetrics applies a sigmoid to scores outside [0, 1], which would tie large logits. Ranks avoid this.
    rank = torch.unique(logits, return_inverse=True)[1]
    return binary_average_precision(rank.double() / len(rank), targets.long(), validate_args=False)


def _envelope_precision(logits: Tensor, targets: Tensor) -> Tensor:
    order = logits.argsort(descending=True)
    ranked, hits = logits[order], (targets[order] == 1).double().cumsum(0)
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # of each group of equal scores
    found, given = hits[last], torch.arange(1, len(hits) + 1)[last]
    envelope = (found / given).flip(0).cummax(0).values.flip(0)
    gained = found.diff(prepend=torch.zeros(1, dtype=torch.float64)) / found[-1]
    return (gained * envelope).sum()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 0.0).float()


def _harmonic(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a + b > 0, 2 * a * b / (a + b), 0.0)
