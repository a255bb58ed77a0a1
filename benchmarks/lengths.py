"""Measures how the effect of unlabeled images depends on the training length of both stages.

    uv run python benchmarks/lengths.py --out DIR --data digits --shares 0.05 --seeds 1 2 --lengths 4:1 15:4 40:10

A length consists of the epochs of warm-up and second stage; an epoch has at least 10 steps. Finished runs are read from
``lengths.jsonl`` and not repeated. The script prints a table at the end: labeled-only training, the paper's recipe, the
preset's network and the final model by number of steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cells import SETTINGS, Results, arguments, cells, mean_and_error
from final_model import RUNS, run
from measuring import markdown, where


def table(found: list[dict[str, Any]]) -> str:
    """Returns a table with a row for each data set, labeled fraction and length."""
    keys = dict.fromkeys((r["data"], r["share"], r["length"]) for r in found)
    lines = []
    for data, share, length in keys:
        mine = [r for r in found if (r["data"], r["share"], r["length"]) == (data, share, length)]
        of = {name: {r["seed"]: r["mAP"] for r in mine if r["kind"] == name} for name in RUNS}
        final = [r["final"]["mAP"] for r in mine if r["kind"] == "preset"]
        alone, recipe = of["labeled only"], of["paper's recipe"]
        gaps = [recipe[seed] - alone[seed] for seed in alone if seed in recipe]
        steps = round(np.mean([r["steps"] for r in mine]))
        values = (mean_and_error(of[name].values()) for name in RUNS)
        lines.append([data, share, length, steps, *values, mean_and_error(final), mean_and_error(gaps)])
    epochs = "epochs (warm-up : second stage)"
    head = ["data", "p", epochs, "steps", *list(RUNS)[:2], "preset's network", "final", "recipe minus labeled only"]
    return markdown(head, lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", nargs="+", required=True, help="epochs of both stages, such as 15:4")
    args = parser.parse_args()
    print(where(), flush=True)
    results = Results("lengths.jsonl", args)
    for cell in cells(args):
        for length in args.lengths:
            warmup, second = map(int, length.split(":"))
            SETTINGS[cell.data] = SETTINGS[cell.data]._replace(warmup=warmup, epochs=second)
            for kind in args.only or RUNS:
                name = f"{kind}, {length}"
                if not results.has(name, cell):
                    results.add(name, cell, {**run(kind, cell, args), "kind": kind, "length": length})
    print("\n" + table(results.read()))


if __name__ == "__main__":
    main()
