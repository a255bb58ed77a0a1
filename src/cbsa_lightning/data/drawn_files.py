"""Files of random draws for one table (splits and label masks): reading them, and checks that they belong to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text


def read_draw(path: Path, kind: str, missing: str) -> Any:
    """Returns the JSON value of a file.

    Args:
        path: The file.
        kind: What it contains, for error messages, such as "split".
        missing: Message if there is no file.

    Raises:
        DataError: If the file is missing, cannot be read, or has a repeated key.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=_once)
    except FileNotFoundError:
        raise DataError(f"{path}: {missing}") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a {kind} ({error}); draw it again") from error


def check_table(path: str | Path, kind: str, recorded: Any, table: AnnotationTable) -> str:
    """Returns the digest of a table for which a file was made.

    Raises:
        DataError: If the file was made for another table.
    """
    if recorded != (digest := table.digest()):
        raise DataError(
            f"{path}: this {kind} was made for the table with digest {brief(recorded)}, but the table here has digest "
            f"{digest} ({len(table)} rows, {table.num_classes} classes); classes, paths and labels must be the same in "
            f"the same order: use the original table, or draw a new {kind}"
        )
    return digest


def check_unchanged(path: str | Path, kind: str, parts: str, found: str, recorded: Any) -> None:
    """Checks the digest of the content.

    Raises:
        DataError: If the file was changed after it was written.
    """
    if found != recorded:
        raise DataError(
            f"{path}: its {parts} have digest {found} but the file says {brief(recorded)}: it was changed after it was "
            f"written; draw the {kind} again"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice, so its value is ambiguous")
    return record
