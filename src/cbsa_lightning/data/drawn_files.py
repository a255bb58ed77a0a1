"""Reading of files with random draws (splits and label masks), which must belong to the table they are used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import DataError
from cbsa_lightning.io.reading import brief, read_text


def read_draw(path: Path, kind: str, missing: str) -> Any:
    """Reads the JSON content of a file.

    Args:
        path: The file.
        kind: Description of the content for error messages, such as "split".
        missing: Error message if the file does not exist.

    Raises:
        DataError: If the file is missing, cannot be read, or contains a repeated key.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=_once)
    except FileNotFoundError:
        raise DataError(f"{path}: {missing}") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: the file cannot be read as a {kind} ({error}); draw it again") from error


def check_table(path: str | Path, kind: str, recorded: Any, table: AnnotationTable) -> str:
    """Checks that a file was created for a table, and returns the digest of the table.

    Raises:
        DataError: If the file was created for another table.
    """
    if recorded != (digest := table.digest()):
        raise DataError(
            f"{path}: this {kind} was created for a table with digest {brief(recorded)}, but this table has digest "
            f"{digest} ({len(table)} rows, {table.num_classes} classes). Classes, paths and labels must be the same "
            f"and in the same order: use the original table, or draw a new {kind}"
        )
    return digest


def check_unchanged(path: str | Path, kind: str, parts: str, found: str, recorded: Any) -> None:
    """Checks the digest of the content of a file.

    Raises:
        DataError: If the file was changed after it was written.
    """
    if found != recorded:
        raise DataError(
            f"{path}: its {parts} have digest {found}, but the recorded digest is {brief(recorded)}. The file was "
            f"changed after it was written; draw the {kind} again"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice, so its value is ambiguous")
    return record
