"""Measures whether unlabeled images help: labeled-only training, the paper's recipe, the safe preset, gain estimates.

    uv run python benchmarks/unlabeled.py --out DIR --data digits photos --shares 0.05 0.1 0.2 \
        --photos DIR --clip DIR --gain [--picture FILE]

The three runs have the same network, initial weights, stages and number of steps. ``--gain`` adds estimates from the
labeled images only (:class:`cbsa_lightning.training.gain.GainCheck`). Finished runs are read from ``rows.jsonl`` and
``estimates-FOLDS.jsonl`` and not repeated. The script prints the tables at the end. With ``--picture``, it also plots
the estimates against the true gains.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from cells import (
    CONTEXTS,
    COUNTED,
    LABELED_PER_BATCH,
    Cell,
    Results,
    arguments,
    cells,
    make_data,
    make_module,
    mean_and_error,
    train,
    trainer_settings,
)
from measuring import markdown, where

from cbsa_lightning.method.labelers import ClassDistributionAware, LabeledOnly
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.training.gain import GainCheck

# name: (labeler, labeled images per step or None for CAP's fraction)
ROWS: dict[str, tuple[Any, int | None]] = {
    "labeled-only": (LabeledOnly(), None),
    "paper's recipe": (ClassDistributionAware(), None),
    "safe preset": (StackedProbes(), LABELED_PER_BATCH),
}


def setting(name: str, cell: Cell, args):
    """Returns the data module and the untrained module of a row."""
    labeler, labeled = ROWS[name]
    data = make_data(cell, args, labeled)
    return data, make_module(cell, args, data, labeler=labeler, num_contexts=CONTEXTS[cell.data])


def row(name: str, cell: Cell, args) -> dict[str, Any]:
    """Trains a row and evaluates it once, at the end, on the test images."""
    data, module = setting(name, cell, args)
    figures = train(cell, module, data)
    positives = (data.eval_table().labels == 1).sum(0).tolist()
    return {**figures, "test_positives": dict(zip(data.class_names, positives, strict=True))}


def estimate(name: str, cell: Cell, args) -> dict[str, Any]:
    """Estimates the gain of a row from the labeled images."""
    data, module = setting(name, cell, args)
    begun = time.process_time()
    gain = GainCheck(args.folds)(module, data, trainer_settings(cell))
    return {
        "mAP": gain.overall[0],
        "overall": gain.overall.tolist(),
        "by_class": dict(zip(gain.class_names, gain.by_class.tolist(), strict=True)),
        "positives": gain.positives.tolist(),
        "seconds": time.process_time() - begun,
    }


def row_table(rows: list[dict[str, Any]], wanted: list[tuple[str, float]]) -> str:
    """Returns a table of means and standard errors over the seeds, and differences from labeled-only by seed."""
    lines = []
    for data, share in wanted:
        runs = {
            name: {r["seed"]: r["mAP"] for r in rows if (r["run"], r["data"], r["share"]) == (name, data, share)}
            for name in ROWS
        }
        base = runs["labeled-only"]
        gaps = [
            [runs[name][seed] - base[seed] for seed in sorted(base) if seed in runs[name]] for name in list(ROWS)[1:]
        ]
        each = ", ".join(f"{gap:+.1f}" for gap in gaps[1])
        lines.append(
            [data, share, *(mean_and_error(runs[name].values()) for name in ROWS), *map(mean_and_error, gaps), each]
        )
    header = ["data", "p", *ROWS, "recipe minus labeled-only", "preset minus labeled-only", "by seed"]
    return markdown(header, lines)


def class_table(rows: list[dict[str, Any]], wanted: list[tuple[str, float]], extremes: int = 3) -> str:
    """Returns a table of the classes whose mean AP over the seeds the preset changes most."""
    lines = []
    for data, share in wanted:
        mine = [r for r in rows if (r["data"], r["share"]) == (data, share)]
        if {r["run"] for r in mine} < set(ROWS):
            continue
        counted = [k for k, n in mine[0]["test_positives"].items() if n >= COUNTED]
        ap = {
            name: {k: 100 * np.mean([r["AP"][k] for r in mine if r["run"] == name]) for k in counted} for name in ROWS
        }
        change = {k: ap["safe preset"][k] - ap["labeled-only"][k] for k in counted}
        order = sorted(counted, key=change.__getitem__)
        for k in dict.fromkeys([*order[:extremes], *order[-extremes:]]):
            lines.append(
                [
                    data,
                    share,
                    k,
                    mine[0]["test_positives"][k],
                    *(f"{ap[name][k]:.1f}" for name in ROWS),
                    f"{change[k]:+.1f}",
                ]
            )
    return markdown(["data", "p", "class", "test positives", *ROWS, "preset minus labeled-only"], lines)


def pairs(rows: list[dict[str, Any]], estimates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the estimates, each with the true gain on the test images."""
    mean = {(r["run"], r["data"], r["share"], r["seed"]): r for r in rows}
    found = []
    for e in estimates:
        cell = (e["data"], e["share"], e["seed"])
        if (e["run"], *cell) in mean and ("labeled-only", *cell) in mean:
            true = mean[e["run"], *cell]["mAP"] - mean["labeled-only", *cell]["mAP"]
            ours, base = mean[e["run"], *cell]["AP"], mean["labeled-only", *cell]["AP"]
            enough = mean["labeled-only", *cell]["test_positives"]
            by_class = [
                (v[0], 100 * (ours[k] - base[k]))
                for k, v in e["by_class"].items()
                if np.isfinite(v[0]) and enough[k] >= COUNTED
            ]
            found.append({**e, "true": true, "class_pairs": by_class})
    return found


def estimate_table(found: list[dict[str, Any]]) -> str:
    """Compares estimated and true gains: error, correlation, sign, and coverage of the interval."""
    lines = []
    for data in dict.fromkeys(p["data"] for p in found):
        for run in (*list(ROWS)[1:], "both"):
            mine = [p for p in found if p["data"] == data and run in (p["run"], "both")]
            if mine:
                lines.append([data, run, *_agreement(mine)])
    if len({p["data"] for p in found}) > 1:
        lines.append(["all", "both", *_agreement(found)])
    header = [
        "data",
        "run",
        "cells",
        "mean estimate",
        "mean true gain",
        "mean absolute error",
        "correlation",
        "sign correct",
        "true gain in interval",
        "correlation over the same classes",
        "correlation by class",
        "sign correct by class",
    ]
    return markdown(header, lines)


def _agreement(found: list[dict[str, Any]]) -> list[str]:
    guess, true = np.array([p["mAP"] for p in found]), np.array([p["true"] for p in found])
    held = [p["overall"][1] <= p["true"] <= p["overall"][2] for p in found]
    means = np.array([np.mean(p["class_pairs"], axis=0) for p in found if p["class_pairs"]])
    classes = np.array([pair for p in found for pair in p["class_pairs"]])
    return [
        str(len(found)),
        f"{guess.mean():+.1f}",
        f"{true.mean():+.1f}",
        f"{np.abs(guess - true).mean():.1f}",
        _correlation(guess, true),
        f"{np.mean(np.sign(guess) == np.sign(true)):.0%}",
        f"{np.mean(held):.0%}",
        _correlation(*means.T),
        _correlation(*classes.T),
        f"{np.mean(np.sign(classes[:, 0]) == np.sign(classes[:, 1])):.0%}",
    ]


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    return f"{np.corrcoef(x, y)[0, 1]:.2f}" if len(x) > 2 else "-"


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """Plots estimated against true gains, each with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    colors = {"paper's recipe": "tab:red", "safe preset": "tab:green"}
    marks = {"digits": "o", "photos": "s"}
    for p in found:
        x, (y, low, high) = p["true"], p["overall"]
        axes.errorbar(
            x, y, [[y - low], [high - y]], fmt=marks[p["data"]], color=colors[p["run"]], elinewidth=0.8, alpha=0.8
        )
    for name, color in colors.items():
        axes.plot([], [], "o", color=color, label=name)
    for name, mark in marks.items():
        axes.plot([], [], mark, color="gray", label=name)
    ends = [min(p["true"] for p in found) - 1, max(p["true"] for p in found) + 1]
    axes.plot(ends, ends, color="gray", linewidth=0.8)
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.axvline(0, color="gray", linewidth=0.5)
    axes.set_xlabel("true gain on the test images, mAP points")
    axes.set_ylabel("estimate from the labeled images, with 90 % bootstrap interval")
    axes.set_title("Gain from the unlabeled images")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gain", action="store_true", help="also estimate the gains")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="file for the plot of estimates against true gains")
    args = parser.parse_args()
    print(where(), flush=True)
    rows, estimates = Results("rows.jsonl", args), Results(f"estimates-{args.folds}.jsonl", args)
    for cell in cells(args):
        for name in args.only or ROWS:
            if not rows.has(name, cell):
                rows.add(name, cell, row(name, cell, args))
            if args.gain and name != "labeled-only" and not estimates.has(name, cell):
                estimates.add(name, cell, estimate(name, cell, args))
    wanted = list(dict.fromkeys((c.data, c.share) for c in cells(args)))
    print("\n" + row_table(rows.read(), wanted))
    print("\n" + class_table(rows.read(), wanted))
    found = pairs(rows.read(), estimates.read())
    if found:
        print("\n" + estimate_table(found))
        if args.picture:
            draw(found, args.picture)


if __name__ == "__main__":
    main()
