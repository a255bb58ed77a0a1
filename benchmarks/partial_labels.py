"""Images that are labeled in part beside unlabeled ones, and single positive labels, against what one would do instead.

    uv run python benchmarks/partial_labels.py --out DIR [--data digits photos --photos DIR --clip DIR]

A share of the images is fully labeled (``--shares``), of four times as many half of the labels are known, the rest is
unlabeled. With single positive labels, as many images as both together have one known positive each and no known
negative. All runs of a cell have the same number of optimizer steps and the same labeled images a step. Finished runs
are read from ``partial_labels.jsonl`` and not made again.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
from cells import LABELED_PER_BATCH, Cell, Results, arguments, cells, make_data, make_module, mean_and_error, train
from measuring import markdown, where
from numpy.typing import NDArray

from cbsa_lightning import SSMLLModule
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.label_masks import LabelMask
from cbsa_lightning.method.labelers import ClassDistributionAware
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP

PARTLY = 4  # times as many images as are fully labeled
STEPS = 27  # an epoch, at least: as many as the unlabeled photographs of p = 0.05 make
PROBES = "probes"  # stacked probes alone, without a network
METHODS: dict[str, dict[str, Any]] = {
    "CAT": {"labeler": ClassDistributionAware()},
    "safe": {"labeler": StackedProbes(), "stack_share": 0.5},
}
# Which labels are known, and whether the others of labeled images are taken as absent.
KNOWN: dict[str, tuple[str, bool]] = {
    "joint": ("partly", False),
    "partly labeled images ignored": ("full", False),
    "unknown as absent": ("partly", True),
    "partly labeled images fully labeled (needs the truth)": ("all", False),
    "single positives": ("single", False),
}


def known_entries(table: AnnotationTable, cell: Cell, kind: str) -> NDArray[np.bool_]:
    """Known entries ``(n, C)`` of a cell."""
    random = np.random.default_rng(cell.seed)
    order = random.permutation(len(table))
    full = int(cell.share * len(table))
    first, second = order[:full], order[full : full * (1 + PARTLY)]
    known = np.zeros(table.labels.shape, dtype=bool)
    halves = random.random(known.shape) < 0.5
    if kind == "single":
        for row in (*first, *second):
            positives = np.flatnonzero(table.labels[row] == 1)
            known[row, random.choice(positives, min(1, len(positives)), replace=False)] = True
        return known
    known[first] = True
    if kind != "full":
        known[second] = halves[second] if kind == "partly" else True
    return known


def one(name: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    method, _, variant = name.partition(": ")
    kind, absent = KNOWN[variant]
    source = make_data(cell, args).source
    source.prepare()
    table, file = source.train(), args.out / f"mask-{cell.data}-{cell.share}-{cell.seed}-{kind}.json"
    LabelMask.of(table, known_entries(table, cell, kind)).save(file)
    changes = {"known_file": str(file), "unknown_as_absent": absent, "min_steps_per_epoch": STEPS}
    data = make_data(cell, args, LABELED_PER_BATCH, labeled_fraction=None, **changes)
    data.prepare_data()
    data.setup("fit")
    if method == PROBES:
        clip = args.clip if cell.data == "photos" else "embedded"
        module = SSMLLModule(
            data.class_names,
            partial(ZeroShotCLIP, clip=clip),
            data.prompt_names,
            labeler=StackedProbes(),
            stack_share=1.0,
            warmup_epochs=0,
        )
        figures = train(cell, module, data, max_epochs=1, check_val_every_n_epoch=1, limit_train_batches=1)
    else:
        figures = train(cell, make_module(cell, args, data, **METHODS[method]), data)
    rates = dict(zip(data.class_names, (data.labeled_targets() == 1).float().mean(0).tolist(), strict=True))
    return {**figures, "labeled": len(data.split.labeled), "rates": rates}


def main() -> None:
    args = arguments(__doc__).parse_args()
    print(where(), flush=True)
    results = Results("partial_labels.jsonl", args)
    names = [f"{method}: {variant}" for method in (PROBES, *METHODS) for variant in KNOWN]
    for cell in cells(args):
        for name in args.only or names:
            if not results.has(name, cell):
                results.add(name, cell, one(name, cell, args))
    found = results.read()
    for data, share in dict.fromkeys((c.data, c.share) for c in cells(args)):
        rows = []
        for name in names:
            runs = {r["seed"]: r["mAP"] for r in found if (r["run"], r["data"], r["share"]) == (name, data, share)}
            joint = f"{name.partition(': ')[0]}: joint"
            other = {r["seed"]: r["mAP"] for r in found if (r["run"], r["data"], r["share"]) == (joint, data, share)}
            if runs:
                gaps = [value - other[seed] for seed, value in runs.items() if seed in other]
                rows.append([name, mean_and_error(runs.values()), mean_and_error(gaps)])
        print(f"\n{data}, p = {share}\n\n{markdown(['run', 'mAP', 'minus joint'], rows)}")


if __name__ == "__main__":
    main()
