"""`cbsa table N`: runs the cells of a table and writes the results, compared with the paper's."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from cbsa_lightning.cli.config_files import find_config, shipped_configs
from cbsa_lightning.clip.loading import OWN
from cbsa_lightning.errors import CBSAError, ConfigError
from cbsa_lightning.io.files import replacing
from cbsa_lightning.reproduce.cells import busy, make, refuse_ranks, result_of
from cbsa_lightning.reproduce.cost import Cost, costs
from cbsa_lightning.reproduce.paper import TABLES, Row, Table, table_of
from cbsa_lightning.reproduce.recipes import Cell, DataSet, make_cell
from cbsa_lightning.reproduce.results import Finished
from cbsa_lightning.reproduce.table_page import refuse_other_files, write_table


def table(args: Sequence[str] | None = None) -> Path:
    """Runs the unfinished cells of a table and writes the table.

    Args:
        args: Command-line arguments; by default those of the process. ``--help`` lists them.

    Returns:
        The Markdown file. CSV files and plots are in the same folder.

    Raises:
        ConfigError: If the arguments are invalid, or if cells could not run. In the latter case, the table is still
            written and lists these cells.
    """
    refuse_ranks()
    options = _parser().parse_args(args)
    own = Path("configs")
    options.configs = options.configs or (own if (own / "methods").is_dir() else shipped_configs())
    options.config = [find_config(file) for file in options.config]
    plan = table_of(options.number)
    if options.min_positives < 1:
        raise ConfigError(
            f"--min_positives is {options.min_positives}, but a class without positives has no AP; use 1 or more."
        )
    file: Path = options.out / f"table_{plan.number}.md"
    refuse_other_files(file, plan)
    sets, rows = _data_sets(plan, options), _rows(plan, options)
    cells = [
        make_cell(row, data, share, seed, options.configs, options.config, _clip(options) or plan.clip, plan.setting)
        for seed in dict.fromkeys(options.seeds or plan.seeds)
        for data in sets
        for share in dict.fromkeys(options.shares or plan.shares)
        for row in rows
    ]
    problems = {} if options.write_only else _run(cells, options.out, options.keep_checkpoints, plan.number)
    cost: dict[str, Cost] = {}
    if plan.number == 9:
        try:
            cost = _cost(cells, options)
        except CBSAError as error:
            problems["Cost of a step"] = f"{type(error).__name__}: {error}"
    finished = [Finished(cell, found) for cell in cells if (found := result_of(cell, options.out))]
    write_table(file, plan, cells, finished, problems, options.min_positives, _settings(options, sets), cost)
    print(f"{file} contains {len(finished)} of {len(cells)} cells")
    if problems:
        listed = "\n".join(f"- {name}: {problem}" for name, problem in problems.items())
        raise ConfigError(f"Some cells could not run; {file} contains the others.\n{listed}")
    return file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cbsa table",
        description="Runs the cells of a table of the paper, writes the results as Markdown, CSV and plots, and "
        "compares them with the paper's. Finished cells are not run again, and interrupted cells resume from their "
        "last epoch. Several processes can share --out: start the command once per GPU.",
    )
    parser.add_argument("number", type=int, help=f"number of the table: {', '.join(map(str, TABLES))}")
    parser.add_argument("--data", nargs="+", metavar="NAME[=FILE]", help="voc, coco, nuswide, or a name and an overlay")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="labeled fractions, such as 0.05 0.10 (Table 5: known labels)"
    )
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--rows", nargs="+", help="labels of rows, or overlays in configs/methods (cbsa+cbsa_safe)")
    parser.add_argument("--config", nargs="+", type=Path, default=[], help="overlays for all cells, such as hardware")
    parser.add_argument("--clip", help="open_clip model or folder, for all rows that use a CLIP")
    parser.add_argument("--pretrained", help="weights for --clip: an open_clip tag or a file; not needed for a folder")
    parser.add_argument(
        "--min_positives", type=int, default=1, help="minimum number of test positives of a class to be included in mAP"
    )
    parser.add_argument("--keep_checkpoints", action="store_true", help="keep the checkpoints of finished cells")
    parser.add_argument("--write_only", action="store_true", help="write the finished cells without running others")
    parser.add_argument("--configs", type=Path, help="folder of the overlays (default: configs, or the package's)")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of the cells and the table")
    return parser


def _run(cells: Sequence[Cell], out: Path, keep_checkpoints: bool, table: int) -> dict[str, str]:
    """Runs the unfinished cells and returns the errors of those that could not run, by name."""
    todo = [cell for cell in {cell.folder: cell for cell in cells}.values() if result_of(cell, out) is None]
    problems: dict[str, str] = {}
    begun, done = time.monotonic(), 0
    for i, cell in enumerate(todo):
        left = "" if not done else f", about {_span((time.monotonic() - begun) / done * (len(todo) - i))} left"
        print(f"Cell {i + 1} of {len(todo)}: {cell.name}{left}", flush=True)
        try:
            if make(cell, out, keep_checkpoints, table):
                done += 1
            else:
                print("... skipped: another process is running it", flush=True)
        except CBSAError as error:
            problems[cell.name] = f"{type(error).__name__}: {error}"
    return problems


def _data_sets(plan: Table, options: argparse.Namespace) -> list[DataSet]:
    sets = [DataSet.named(text, options.configs) for text in options.data or plan.data]
    for data in sets:
        if not data.file.is_file():
            raise ConfigError(
                f"There is no {data.file}. Use --data NAME=FILE, or the name of a file in {options.configs / 'data'}."
            )
    if len({data.name for data in sets}) < len(sets):
        raise ConfigError("--data contains the same name twice. Use a different name for each data set.")
    return sets


def _rows(plan: Table, options: argparse.Namespace) -> tuple[Row, ...]:
    rows = plan.select(list(dict.fromkeys(options.rows))) if options.rows else plan.rows
    for row in rows:
        for name in row.overlays:
            if not (options.configs / "methods" / f"{name}.yaml").is_file():
                labels = ", ".join(repr(known.label) for known in plan.rows)
                raise ConfigError(
                    f"Table {plan.number} has no row '{row.label}', and {options.configs / 'methods'} has no "
                    f"{name}.yaml. The rows of the table are {labels}."
                )
    return rows


def _clip(options: argparse.Namespace) -> tuple[str, str] | None:
    if options.pretrained and not options.clip:
        raise ConfigError("--pretrained sets the weights of --clip: use both options, or set both in an overlay.")
    return (options.clip, options.pretrained or OWN) if options.clip else None


def _cost(cells: Sequence[Cell], options: argparse.Namespace) -> dict[str, Cost]:
    """Returns the cost of a step by row: stored values if the cells are the same, otherwise new measurements.

    Raises:
        ConfigError: If other processes are running cells, which would distort the measurement.
    """
    file = options.out / "table_9_cost.json"
    names = [cell.folder for cell in cells]
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cells": [], "cost": {}}
    if stored["cells"] != names and not options.write_only:
        if any(busy(cell, options.out) for cell in cells):
            raise ConfigError(
                "Other processes are running cells, which would distort the measurement. Try again when they finish."
            )
        stored = {"cells": names, "cost": costs({cell.row.label: cell.recipe for cell in cells})}
        with replacing(file) as draft:
            draft.write_text(json.dumps(stored), encoding="utf-8")
    return {label: Cost(*values) for label, values in stored["cost"].items()}


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def _settings(options: argparse.Namespace, sets: Sequence[DataSet]) -> dict[str, str]:
    """Returns the name and content of each overlay that all cells use in addition to their method."""
    files = [*(data.file for data in sets), *options.config]
    names = [file.name for file in files]
    found = {
        file.name if names.count(file.name) == 1 else str(file): file.read_text(encoding="utf-8") for file in files
    }
    if options.clip:
        found["--clip"] = f"{Path(options.clip).name}, weights: {options.pretrained or 'those of the folder'}\n"
    return found
