"""The command line: ``uv run python -m fuzz --inputs 100000 --seed 1``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from fuzz.campaign import Tally, run_target
from fuzz.harness import Target
from fuzz.targets import TARGETS


def shares(targets: list[Target], inputs: int) -> dict[str, int]:
    """How many of ``inputs`` each target gets."""
    whole = sum(target.share for target in targets)
    return {target.name: -(-inputs * target.share // whole) for target in targets}


def table(tallies: dict[str, Tally]) -> str:
    """Outcomes by target, in Markdown; the last row sums them."""
    every: Counter[str] = sum((tally.outcomes for tally in tallies.values()), Counter())
    kinds = ["valid", *sorted(every.keys() - {"valid", "defect"}), "defect"]
    rows = [(name, tally.outcomes) for name, tally in tallies.items()] + [("all", every)]
    lines = [["target", "inputs", *kinds], ["---"] * (len(kinds) + 2)]
    lines += [[name, f"{counts.total():,}", *(f"{counts[kind]:,}" for kind in kinds)] for name, counts in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Runs the campaign and prints its table; the exit status is 1 if there are defects."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=sys.modules["fuzz"].__doc__)
    parser.add_argument("--seed", type=int, default=1, help="all inputs are a function of it")
    parser.add_argument("--inputs", type=int, default=2000, help="inputs of all targets together")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="this target alone; may be repeated")
    parser.add_argument("--start", type=int, default=0, help="first input of each target: runs one of them again")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where the inputs of defects are kept")
    given = parser.parse_args()
    targets = [TARGETS[name]() for name in given.only or TARGETS]
    counts = shares(targets, given.inputs)
    tallies = {}
    with tqdm(total=sum(counts.values()), unit=" inputs", smoothing=0.05, mininterval=1.0) as bar:
        for target in targets:
            bar.set_description(target.name)
            tallies[target.name] = run_target(target, given.seed, given.start, counts[target.name], given.out, bar)
    for name, tally in tallies.items():
        for index, what in tally.defects:
            print(f"{name} {index}: {what}".encode("utf-8", "backslashreplace").decode())
    print(f"\nseed {given.seed}\n\n{table(tallies)}")
    return 1 if any(tally.defects for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
