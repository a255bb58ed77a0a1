"""CSV, TSV and Parquet files as columns of text, with a name for every row."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cbsa_lightning.data.annotations import StringArray, repeated_rows
from cbsa_lightning.data.class_names import clean_name, did_you_mean, duplicates
from cbsa_lightning.errors import DataError, listed

IMAGE_COLUMNS = ("image", "path", "file", "filename")
DELIMITERS = (",", "\t", ";")


@dataclass(frozen=True)
class Columns:
    """A table file as it was read.

    Attributes:
        path: The file.
        table: Its columns; those of a CSV file are text.
        first_row: What the first row of data is called: 2 in a CSV file, after the header; 1 in Parquet.
    """

    path: Path
    table: Any
    first_row: int

    @property
    def names(self) -> list[str]:
        """Column names."""
        return list(self.table.column_names)

    def where(self, i: int) -> str:
        """File and row of data row ``i``, for a message."""
        return f"{self.path}, row {i + self.first_row}"

    def text(self, name: str) -> Any:
        """A column as one array of text without surrounding white space; null stays null.

        Raises:
            DataError: The column is of a type that has no text.
        """
        column = self.table.column(name)
        try:
            cells = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{self.path}: column {name!r} of type {column.type} is no text ({error}); convert it"
            ) from error
        return pa.concat_arrays(cells.chunks) if cells.num_chunks else pa.array([], pa.large_string())

    def image_paths(self) -> Any:
        """Cells of the image column, the first of ``IMAGE_COLUMNS`` that is there, as one array of text without null.

        Raises:
            DataError: No such column.
        """
        name = next((name for name in IMAGE_COLUMNS if name in self.names), None)
        if name is None:
            raise DataError(
                f"{self.path}: no image column; its columns are {listed(map(repr, self.names))}; name the "
                f"one with the paths {' or '.join(IMAGE_COLUMNS)}"
            )
        return self.text(name).fill_null("")


def refuse_repeated_rows(columns: Columns, paths: StringArray) -> None:
    """Refuses two rows for one image.

    Raises:
        DataError: Names the path and both rows.
    """
    if pairs := repeated_rows(paths):
        first = columns.first_row
        found = listed(f"{str(paths[i])!r} (rows {i + first} and {j + first})" for i, j in pairs)
        raise DataError(f"{columns.path}: the same image twice: {found}; keep one row an image")


def read_columns(path: str | Path) -> Columns:
    """Reads a Parquet file (".parquet", ".pq") or a CSV file (any other name; UTF-8, with a header).

    The delimiter is the first of comma, tab and semicolon that splits the header. A cell may stand in double
    quotes. Empty lines are passed over and do not count as rows.

    Raises:
        DataError: The file is missing, empty, not UTF-8, has a column twice, or a row of another length.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no table here; correct the path")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            columns = Columns(path, pq.read_table(path), 1)
        else:
            columns = Columns(path, _read_csv(path), 2)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); correct the file") from error
    names = [clean_name(name) for name in columns.names]
    if pairs := duplicates(names):
        found = listed(f"{names[i]!r} (columns {i + 1} and {j + 1})" for i, j in pairs)
        raise DataError(f"{path}: the same column twice: {found}; rename or remove one")
    if not columns.table.num_rows:
        raise DataError(f"{path}: has a header but no rows; add some")
    return Columns(path, columns.table.rename_columns(names), columns.first_row)


def column_named(columns: Columns, names: list[str]) -> str:
    """The column that bears one of ``names``.

    Raises:
        DataError: None does, or two do.
    """
    found = [name for name in names if name in columns.names]
    if len(found) > 1:
        raise DataError(f"{columns.path}: columns {listed(map(repr, found))} mean one class; keep one")
    if not found:
        raise DataError(
            f"{columns.path}: no column for class {names[0]!r}{did_you_mean(names[0], columns.names)}; "
            f"its columns are {listed(map(repr, columns.names))}; add it, or take the class out"
        )
    return found[0]


def _read_csv(path: Path) -> Any:
    delimiter, header = _header(path)
    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    try:
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # or rows would have no number
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=refuse),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.large_string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if wrong:
            row = wrong[0]
            raise DataError(
                f"{path}, row {row.number}: {row.actual_columns} cells where the header has "
                f"{row.expected_columns}: {row.text[:200]!r}; correct it, or quote cells with {delimiter!r}"
            ) from error
        if "UTF8" in str(error):
            raise DataError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
        raise


def _header(path: Path) -> tuple[str, list[str]]:
    """Delimiter and column names."""
    with path.open("rb") as stream:
        raw = stream.readline().rstrip(b"\r\n")
    try:
        line = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    if not line.strip():
        raise DataError(f"{path}: has no header in its first row; name the columns there")
    delimiter = next((mark for mark in DELIMITERS if len(next(csv.reader([line], delimiter=mark))) > 1), ",")
    return delimiter, next(csv.reader([line], delimiter=delimiter))
