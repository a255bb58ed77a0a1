"""Compares training on partly labeled images and on single positive labels with simpler alternatives.

    uv run python benchmarks/partial_labels.py --out DIR [--data digits photos --photos DIR --clip DIR]

A fraction of the images is fully labeled (``--shares``). Half of the labels of four times as many images are known. The
remaining images are unlabeled. With single positive labels, the same images have one known positive each and no known
negative. All runs of a cell have the same number of optimizer steps and of labeled images per step. Finished runs are
read from ``partial_labels.jsonl`` and not repeated.
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
from cbsa_lightning.method.losses import BinaryCrossEntropy
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP

PARTLY = 4  # number of partly labeled images per fully labeled image
STEPS = 27  # minimum steps per epoch: one pass over the unlabeled photographs at p = 0.05
PROBES = "probes"  # stacked probes without a network
METHODS: dict[str, dict[str, Any]] = {
    "CAT": {"labeler": ClassDistributionAware()},
    "CAT, BCE": {"labeler": ClassDistributionAware(), "loss": BinaryCrossEntropy()},
    "safe": {"labeler": StackedProbes(), "stack_share": 0.5},
}
# name: (known labels, whether unknown labels of labeled images count as absent)
KNOWN: dict[str, tuple[str, bool]] = {
    "all known entries are used": ("partly", False),
    "partly labeled images are ignored": ("full", False),
    "unknown entries count as absent": ("partly", True),
    "partly labeled images are fully labeled": ("all", False),
    "one positive label per image": ("single", False),
}


def known_entries(table: AnnotationTable, cell: Cell, kind: str) -> NDArray[np.bool_]:
    """Returns the mask ``(n, C)`` of the known entries of a cell."""
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
    """Trains and tests one run."""
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
            joint = f"{name.partition(': ')[0]}: all known entries are used"
            other = {r["seed"]: r["mAP"] for r in found if (r["run"], r["data"], r["share"]) == (joint, data, share)}
            if runs:
                gaps = [value - other[seed] for seed, value in runs.items() if seed in other]
                rows.append([name, mean_and_error(runs.values()), mean_and_error(gaps)])
        print(f"\n{data}, p = {share}\n\n{markdown(['run', 'mAP', 'minus the first row'], rows)}")


if __name__ == "__main__":
    main()
