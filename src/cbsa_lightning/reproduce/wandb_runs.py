"""Names of the W&B runs of cells, so that the cells of a table can be grouped and filtered."""

from __future__ import annotations

import copy
from typing import Any

from cbsa_lightning.reproduce.paper import share_text
from cbsa_lightning.reproduce.recipes import Cell


def with_run_name(loggers: Any, cell: Cell, table: int | None) -> Any:
    """Returns the setting ``trainer.logger`` with the name, group and job type of a cell's W&B run.

    The name is that of the cell, the group is "table/data set/fraction", and the job type is the label of the row. A
    group or job type of the recipe is kept.

    Args:
        loggers: The setting: loggers, one logger, or True or False.
        cell: The cell.
        table: Number of the table; None if the cell is not run for a table.
    """
    if isinstance(loggers, list):
        return [with_run_name(logger, cell, table) for logger in loggers]
    if not isinstance(loggers, dict) or str(loggers.get("class_path")).rpartition(".")[2] != "WandbLogger":
        return loggers
    named = copy.deepcopy(loggers)
    arguments = named["init_args"] = named.get("init_args") or {}
    parts = ([] if table is None else [f"table {table}"]) + [cell.data, share_text(cell.setting, cell.share)]
    for key, value in (("group", "/".join(parts)), ("job_type", cell.row.label)):
        if arguments.get(key) is None:
            arguments[key] = value
    arguments["name"] = cell.name
    return named
