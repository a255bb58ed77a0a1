"""Why pseudo-labels hurt: the paper's recipe with one thing changed at a time, and their quality over the epochs.

    uv run python benchmarks/pseudo_labels.py --out DIR [--data digits photos --photos DIR --clip DIR] [--picture FILE]

Hidden labels of the unlabelled images are looked at here, to understand; no setting is chosen by them. Finished runs
are read from ``ablation.jsonl`` and not made again. Ends with the table, and with ``--picture`` a chart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, Results, arguments, cells, make_data, make_module, mean_and_error, train
from measuring import markdown, where
from torch import Tensor

from cbsa_lightning.labelers import ClassDistributionAware, Labeler, LabelledOnly, PseudoLabels
from cbsa_lightning.losses import BinaryCrossEntropy
from cbsa_lightning.metrics import pseudo_label_quality


class Watched(Labeler):
    """A labeler whose quality is written down at each epoch, and that may be corrected from the hidden truth.

    Args:
        labeler: Makes the labels.
        truth: ``(n, C)`` in {1, 0, -1}.
        correct: Changes labels, given the truth; None leaves them.
    """

    def __init__(self, labeler: Labeler, truth: Tensor, correct: Any = None) -> None:
        self.labeler, self.truth, self.correct = labeler, truth, correct
        self.epochs: list[dict[str, Any]] = []

    def __call__(self, scores: Tensor, positive_rate: Tensor) -> PseudoLabels:
        """See :class:`Labeler`."""
        made = self.labeler(scores, positive_rate)
        labels = made.labels if self.correct is None else self.correct(made.labels.clone(), self.truth, positive_rate)
        quality = pseudo_label_quality(labels, self.truth)
        covered = (labels >= 0).float().mean(0)
        self.epochs.append(
            {
                "precision": quality["class_precision"].tolist(),
                "recall": quality["class_recall"].tolist(),
                "coverage": covered.tolist(),
                "positives": (labels == 1).sum(0).tolist(),
            }
        )
        return PseudoLabels(labels, made.tau_pos, made.tau_neg)


def ignore_wrong_positives(labels: Tensor, truth: Tensor, rate: Tensor) -> Tensor:
    labels[(labels == 1) & (truth == 0)] = -1
    return labels


def ignore_missed_positives(labels: Tensor, truth: Tensor, rate: Tensor) -> Tensor:
    labels[(labels == 0) & (truth == 1)] = -1
    return labels


def true_labels(labels: Tensor, truth: Tensor, rate: Tensor) -> Tensor:
    return truth.to(labels)


class IgnoreRare:
    """Ignores classes with fewer than ``least`` labelled positives."""

    def __init__(self, labelled: int, least: int = 3) -> None:
        self.labelled, self.least = labelled, least

    def __call__(self, labels: Tensor, truth: Tensor, rate: Tensor) -> Tensor:
        labels[:, rate.to(labels.device) * self.labelled < self.least - 0.5] = -1
        return labels


PAPER = ClassDistributionAware()
# name: (labeler, correction, labelled images a step or None for CAP's share, changes of the module)
RUNS: dict[str, tuple[Labeler, Any, int | None, dict[str, Any]]] = {
    "labelled-only": (LabelledOnly(), None, None, {}),
    "paper's recipe": (PAPER, None, None, {}),
    "wrong positives ignored (needs the truth)": (PAPER, ignore_wrong_positives, None, {}),
    "missed positives ignored (needs the truth)": (PAPER, ignore_missed_positives, None, {}),
    "classes with under 3 labelled positives ignored": (PAPER, IgnoreRare, None, {}),
    "wide ignored band, eta (0.4, 0.8)": (ClassDistributionAware(0.4, 0.8), None, None, {}),
    "16 labelled images a step": (PAPER, None, 16, {}),
    "the average's decay 0.9997": (PAPER, None, None, {"ema_decay": 0.9997}),
    "the average's decay 0.9": (PAPER, None, None, {"ema_decay": 0.9}),
    "cross-entropy instead of ASL": (PAPER, None, None, {"loss": BinaryCrossEntropy}),
    "weight 0.3": (PAPER, None, None, {"unsup_weight": 0.3}),
    "true labels (needs the truth)": (PAPER, true_labels, None, {}),
}


def one(name: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the ablation, with the quality of its pseudo-labels at each epoch."""
    labeler, correct, labelled, changes = RUNS[name]
    data = make_data(cell, args, labelled)
    data.prepare_data()
    data.setup("fit")
    if correct is IgnoreRare:
        correct = IgnoreRare(len(data.split.labelled))
    # A labeler that labels nothing changes the second stage's batches, so it must be seen for what it is.
    watched = labeler if isinstance(labeler, LabelledOnly) else Watched(labeler, data.hidden_targets(), correct)
    made = {key: value() if key == "loss" else value for key, value in changes.items()}
    figures = train(cell, make_module(cell, args, data, labeler=watched, **made), data)
    if isinstance(watched, Watched):
        figures["epochs"] = watched.epochs
        labelled_positives = (data.labelled_targets() == 1).sum(0).tolist()
        figures["classes"] = dict(zip(data.class_names, labelled_positives, strict=True))
    return figures


def table(found: list[dict[str, Any]], data: str, share: float) -> str:
    """One row a run: mAP, difference to the paper's recipe on the same draws, quality at the last epoch."""
    mine = [r for r in found if (r["data"], r["share"]) == (data, share)]
    paper = {r["seed"]: r["mAP"] for r in mine if r["run"] == "paper's recipe"}
    rows = []
    for name in RUNS:
        runs = [r for r in mine if r["run"] == name]
        gaps = [r["mAP"] - paper[r["seed"]] for r in runs if r["seed"] in paper]
        quality = [
            mean_and_error(r["pseudo"][key] for r in runs if key in r["pseudo"]) if runs and runs[0]["pseudo"] else "-"
            for key in ("precision", "recall", "coverage")
        ]
        rows.append([name, mean_and_error(r["mAP"] for r in runs), mean_and_error(gaps), *quality])
    return markdown(["run", "mAP", "minus the paper's recipe", "precision", "recall", "coverage"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--picture", type=Path, help="where to draw precision, recall and coverage over the epochs")
    args = parser.parse_args()
    print(where(), flush=True)
    results = Results(args.out / "ablation.jsonl")
    for cell in cells(args):
        for name in args.only or RUNS:
            if not results.has(name, cell):
                results.add(name, cell, one(name, cell, args))
    found = results.read()
    for data, share in dict.fromkeys((c.data, c.share) for c in cells(args)):
        print(f"\n{data}, p = {share}\n\n{table(found, data, share)}")


if __name__ == "__main__":
    main()
