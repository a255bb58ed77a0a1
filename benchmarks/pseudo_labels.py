"""Analyzes why pseudo-labels hurt: the paper's recipe with one change at a time, and the label quality by epoch.

    uv run python benchmarks/pseudo_labels.py --out DIR [--data digits photos --photos DIR --clip DIR] [--picture FILE]

This analysis uses hidden labels of the unlabeled images. docs/explanation/unlabeled.md describes how settings were
chosen. Finished runs are read from ``ablation.jsonl`` and not repeated. The script prints the table at the end and,
with ``--picture``, writes a plot.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from cells import (
    LABELED_PER_BATCH,
    Cell,
    Results,
    arguments,
    cells,
    counted_map,
    make_data,
    make_module,
    mean_and_error,
    train,
)
from measuring import markdown, where
from torch import Tensor

from cbsa_lightning.method.labelers import (
    ClassDistributionAware,
    Evidence,
    EvidenceLabeler,
    LabeledOnly,
    Labeler,
    PseudoLabels,
    positive_rates,
    rounded,
)
from cbsa_lightning.method.losses import BinaryCrossEntropy
from cbsa_lightning.method.metrics import MultilabelReport, pseudo_label_quality
from cbsa_lightning.method.stacking import StackedProbes


class Watched(Labeler):
    """A labeler that records the quality of its labels in each epoch and optionally corrects them with hidden labels.

    Args:
        labeler: Computes the labels.
        truth: ``(n, C)`` in {1, 0, -1}.
        correct: Changes the labels, given the truth; None keeps them.
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
    """Ignores classes with fewer than ``least`` labeled positives."""

    def __init__(self, labeled: int, least: int = 3) -> None:
        self.labeled, self.least = labeled, least

    def __call__(self, labels: Tensor, truth: Tensor, rate: Tensor) -> Tensor:
        labels[:, rate.to(labels.device) * self.labeled < self.least - 0.5] = -1
        return labels


class Changed(EvidenceLabeler):
    """Stacked probes with a changed input or output.

    Args:
        see: Changes the evidence; None keeps it.
        say: Changes the targets; None keeps them.
        labeler: The labeler; by default stacked probes.
    """

    def __init__(self, see: Any = None, say: Any = None, labeler: EvidenceLabeler | None = None) -> None:
        self.see, self.say, self.labeler = see, say, labeler if labeler is not None else StackedProbes()

    def __call__(self, evidence: Evidence) -> Tensor:
        """See :class:`EvidenceLabeler`."""
        targets = self.labeler(evidence if self.see is None else self.see(evidence))
        return targets if self.say is None else self.say(targets, evidence)


def only_zero_shot(evidence: Evidence) -> Evidence:
    return evidence._replace(descriptors=[])


def only_probes(evidence: Evidence) -> Evidence:
    return evidence._replace(scores=[])


def hard(targets: Tensor, evidence: Evidence) -> Tensor:
    return rounded(targets).float()


def at_class_rates(targets: Tensor, evidence: Evidence) -> Tensor:
    """Applies CAT to the probabilities of the stack instead of the network's."""
    return PAPER(targets, positive_rates(evidence.labels)).labels.float()


def only_sure(targets: Tensor, evidence: Evidence) -> Tensor:
    return torch.where((targets >= 0.6) | (targets <= 0.1), targets, -1.0)


PAPER = ClassDistributionAware()
# name: (labeler, correction, labeled images per step or None for CAP's fraction, arguments of the module)
RUNS: dict[str, tuple[Labeler | EvidenceLabeler, Any, int | None, dict[str, Any]]] = {
    "labeled-only": (LabeledOnly(), None, None, {}),
    "paper's recipe": (PAPER, None, None, {}),
    "wrong positives ignored (needs the truth)": (PAPER, ignore_wrong_positives, None, {}),
    "missed positives ignored (needs the truth)": (PAPER, ignore_missed_positives, None, {}),
    "classes with fewer than 3 labeled positives ignored": (PAPER, IgnoreRare, None, {}),
    "wide ignored band, eta (0.4, 0.8)": (ClassDistributionAware(0.4, 0.8), None, None, {}),
    "16 labeled images per step": (PAPER, None, 16, {}),
    "average decay 0.9997": (PAPER, None, None, {"ema_decay": 0.9997}),
    "average decay 0.9": (PAPER, None, None, {"ema_decay": 0.9}),
    "cross-entropy instead of ASL": (PAPER, None, None, {"loss": BinaryCrossEntropy}),
    "weight 0.3": (PAPER, None, None, {"unsup_weight": 0.3}),
    "true labels (needs the truth)": (PAPER, true_labels, None, {}),
    "safe preset": (StackedProbes(), None, LABELED_PER_BATCH, {}),
    "preset, CAP's fraction of labeled images": (StackedProbes(), None, None, {}),
    "preset, only zero-shot scores": (Changed(see=only_zero_shot), None, LABELED_PER_BATCH, {}),
    "preset, only probes": (Changed(see=only_probes), None, LABELED_PER_BATCH, {}),
    "preset, same weights for rare and frequent classes": (StackedProbes(1e-9), None, LABELED_PER_BATCH, {}),
    "preset, rounded to hard labels": (Changed(say=hard), None, LABELED_PER_BATCH, {}),
    "preset, CAT on its probabilities": (Changed(say=at_class_rates), None, LABELED_PER_BATCH, {}),
    "preset, probabilities between .1 and .6 ignored": (Changed(say=only_sure), None, LABELED_PER_BATCH, {}),
    "preset, cross-entropy instead of ASL": (StackedProbes(), None, LABELED_PER_BATCH, {"loss": BinaryCrossEntropy}),
}
# The stack scores the test images directly, without a network.
STACKS: dict[str, EvidenceLabeler] = {
    "stack only": StackedProbes(),
    "stack only, zero-shot scores": Changed(see=only_zero_shot),
    "stack only, probes": Changed(see=only_probes),
    "stack only, same weights for rare and frequent classes": StackedProbes(1e-9),
}


def one(name: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one run of the ablation and records the quality of its pseudo-labels in each epoch."""
    labeler, correct, labeled, changes = RUNS[name]
    data = make_data(cell, args, labeled)
    data.prepare_data()
    data.setup("fit")
    if correct is IgnoreRare:
        correct = IgnoreRare(len(data.split.labeled))
    # Only labelers that run in each epoch are recorded. The training loop must recognize the type of the others.
    plain = isinstance(labeler, LabeledOnly | EvidenceLabeler)
    watched = labeler if plain else Watched(labeler, data.hidden_targets(), correct)
    made = {key: value() if key == "loss" else value for key, value in changes.items()}
    figures = train(cell, make_module(cell, args, data, labeler=watched, **made), data)
    if isinstance(watched, Watched):
        figures["epochs"] = watched.epochs
        labeled_positives = (data.labeled_targets() == 1).sum(0).tolist()
        figures["classes"] = dict(zip(data.class_names, labeled_positives, strict=True))
    return figures


def stack_alone(name: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates a stack on the test images, whose statistics replace those of the unlabeled images."""
    data = make_data(cell, args)
    data.prepare_data()
    data.setup("fit")
    file = args.out / f"descriptions-{cell.data}.pt"
    if not file.exists():
        network = make_module(cell, args, data).network
        describe = network.describer()
        loaders = data.plain_dataloader(range(len(data.train_table))), data.val_dataloader()
        parts = [[describe(network.features(batch.images)) for batch in loader] for loader in loaders]
        torch.save([[torch.cat(x) for x in zip(*((*d, *s) for d, s in part), strict=True)] for part in parts], file)
    train_parts, test_parts = torch.load(file)
    known = data.split.labeled
    both = [torch.cat([train[known], test]) for train, test in zip(train_parts, test_parts, strict=True)]
    evidence = Evidence(both[:-1], both[-1:], torch.arange(len(known)), data.labeled_targets())
    report = MultilabelReport(len(data.class_names))
    said, truth = STACKS[name](evidence).clamp(1e-6, 1 - 1e-6), torch.from_numpy(data.test_table.labels)
    report.update(said.logit(), truth)
    known = truth >= 0
    log_loss = torch.nn.functional.binary_cross_entropy(said[known], truth[known].float())
    ap = dict(zip(data.class_names, report.compute()["AP"].tolist(), strict=True))
    return {"mAP": counted_map(ap, data), "AP": ap, "pseudo": {}, "log_loss": float(log_loss)}


def table(found: list[dict[str, Any]], data: str, share: float) -> str:
    """Returns a table with one row per run: mAP, difference from the paper's recipe by seed, and final quality."""
    mine = [r for r in found if (r["data"], r["share"]) == (data, share)]
    paper = {r["seed"]: r["mAP"] for r in mine if r["run"] == "paper's recipe"}
    rows = []
    for name in (*RUNS, *STACKS):
        runs = [r for r in mine if r["run"] == name]
        gaps = [r["mAP"] - paper[r["seed"]] for r in runs if r["seed"] in paper]
        quality = [
            mean_and_error(100 * r["pseudo"][key] for r in runs) if runs and runs[0]["pseudo"] else "-"
            for key in ("precision", "recall", "coverage")
        ]
        losses = [r["log_loss"] for r in runs if "log_loss" in r]
        log_loss = f"{np.mean(losses):.4f}" if losses else "-"
        if runs:
            rows.append([name, mean_and_error(r["mAP"] for r in runs), mean_and_error(gaps), *quality, log_loss])
    return markdown(["run", "mAP", "minus the paper's recipe", "precision", "recall", "coverage", "log-loss"], rows)


def draw(found: list[dict[str, Any]], wanted: list[tuple[str, float]], file: Path) -> None:
    """Plots precision, recall and coverage of the paper's pseudo-labels by class, and the ablation, by data set."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 5.2 * len(wanted)), layout="constrained")
    grid = figure.subplots(len(wanted), 4, squeeze=False, width_ratios=[1, 1, 1, 1.3])
    for axes, (data, share) in zip(grid, wanted, strict=True):
        mine = [r for r in found if (r["data"], r["share"]) == (data, share)]
        runs = [r for r in mine if r["run"] == "paper's recipe"]
        names = [n for n in runs[0]["classes"] if max(r["AP"][n] for r in runs) > 0]
        places = [list(runs[0]["classes"]).index(n) for n in names]
        labeled = [np.mean([r["classes"][n] for r in runs]) for n in names]
        norm = LogNorm(0.3, max(labeled))
        for ax, key in zip(axes, ("precision", "recall", "coverage"), strict=False):
            for n, k, number in zip(names, places, labeled, strict=True):
                line = np.mean([[epoch[key][k] for epoch in r["epochs"]] for r in runs], axis=0)
                color = matplotlib.colormaps["viridis"](norm(max(number, 0.3)))
                ax.plot(range(1, len(line) + 1), line, color=color)
                if key != "coverage":  # all lines of the coverage overlap
                    ax.annotate(n, (len(line), line[-1]), fontsize=7, xytext=(3, -2), textcoords="offset points")
            ax.set(xlabel="epoch of the second stage", ylim=(0, 1.02), title=f"{data}, p = {share}: {key} by class")
        scale = matplotlib.cm.ScalarMappable(norm, "viridis")
        figure.colorbar(scale, ax=axes[2], label="labeled positives of the class (mean over seeds)")
        base = {r["seed"]: r["mAP"] for r in mine if r["run"] == "labeled-only"}
        gaps = {
            n: [r["mAP"] - base[r["seed"]] for r in mine if r["run"] == n and r["seed"] in base]
            for n in (*RUNS, *STACKS)
        }
        shown = [n for n, gap in gaps.items() if gap and n != "labeled-only"][::-1]
        means = [np.mean(gaps[n]) for n in shown]
        axes[3].barh(shown, means, color=["tab:green" if m > 0 else "tab:red" for m in means], alpha=0.6)
        for y, n in enumerate(shown):
            axes[3].plot(gaps[n], [y] * len(gaps[n]), ".", color="black", markersize=4)
        axes[3].axvline(0, color="gray", linewidth=0.8)
        axes[3].tick_params(axis="y", labelsize=8)
        axes[3].set(xlabel="mAP points", title="minus labeled-only (dots: seeds)")
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--picture", type=Path, help="file for the plot of precision, recall and coverage by epoch")
    args = parser.parse_args()
    print(where(), flush=True)
    results = Results("ablation.jsonl", args)
    for cell in cells(args):
        for name in args.only or (*RUNS, *STACKS):
            if not results.has(name, cell):
                results.add(name, cell, (stack_alone if name in STACKS else one)(name, cell, args))
    found = results.read()
    for data, share in dict.fromkeys((c.data, c.share) for c in cells(args)):
        print(f"\n{data}, p = {share}\n\n{table(found, data, share)}")
    if args.picture:
        draw(found, list(dict.fromkeys((c.data, c.share) for c in cells(args))), args.picture)


if __name__ == "__main__":
    main()
