"""CSV, TSV and Parquet files as columns of text, with a name for every row."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cbsa_lightning.data.annotations import StringArray, repeated_rows
from cbsa_lightning.data.class_names import clean_name, did_you_mean, duplicates
from cbsa_lightning.data.reading import brief, memory_of_machine, open_regular, refuse_larger_than_memory
from cbsa_lightning.errors import DataError, listed

IMAGE_COLUMNS = ("image", "path", "file", "filename")
DELIMITERS = (",", "\t", ";")
_LONGEST_ROW = 1 << 20  # bytes; what Arrow reads of a CSV file at a time, and so the most that a row may have
_BATCH = 1 << 12  # rows of a Parquet file at a time: so few that even of long texts they fit


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
            DataError: The column is of a type that has no text, or is damaged; a cell of a CSV file has a line
                break inside, as where a quote is not closed.
        """
        cells = self._cast(name, pa.large_string())
        cells = pc.utf8_trim_whitespace(cells)
        if self.first_row == 2 and (row := pc.index(pc.match_substring_regex(cells, r"[\r\n]"), True).as_py()) >= 0:
            raise DataError(
                f"{self.where(row)}: a cell of column {brief(name)} has a line break: {brief(cells[row].as_py())}; "
                "close the quotes, or take the line break out"
            )
        return cells

    def lists(self, name: str) -> Any:
        """A column of lists of names, as one array of lists of text.

        Raises:
            DataError: What is listed has no text, or the column is damaged.
        """
        return self._cast(name, pa.large_list(pa.large_string()))

    def _cast(self, name: str, kind: Any) -> Any:
        column = self.table.column(name)
        try:
            column.validate(full=True)  # Parquet's texts are not checked as they are read
            column = column.cast(kind)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.path}: column {brief(name)} of type {brief(str(column.type))} is no text ({error}); convert it"
            ) from error
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)

    def image_paths(self) -> Any:
        """Cells of the image column, the first of ``IMAGE_COLUMNS`` that is there, as one array of text without null.

        Raises:
            DataError: No such column.
        """
        name = next((name for name in IMAGE_COLUMNS if name in self.names), None)
        if name is None:
            raise DataError(
                f"{self.path}: no image column; its columns are {listed(map(brief, self.names))}; name the "
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
        found = listed(f"{brief(str(paths[i]))} (rows {i + first} and {j + first})" for i, j in pairs)
        raise DataError(f"{columns.path}: the same image twice: {found}; keep one row an image")


def read_columns(path: str | Path) -> Columns:
    """Reads a Parquet file (".parquet", ".pq") or a CSV file (any other name; UTF-8, with a header).

    The delimiter is the first of comma, tab and semicolon that splits the header. A cell may stand in double
    quotes. Empty lines are passed over and do not count as rows.

    Raises:
        DataError: The file is missing, empty, not UTF-8, too large for memory, has a column twice, a row of another
            length or of megabytes, or a quote that is not closed.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            if path.suffix.lower() in (".parquet", ".pq"):
                columns = Columns(path, _read_parquet(path, file), 1)
            else:
                columns = Columns(path, _read_csv(path, file), 2)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no table here; correct the path") from None
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); correct the file") from error
    names = [clean_name(name) for name in columns.names]
    if pairs := duplicates(names):
        found = listed(f"{brief(names[i])} (columns {i + 1} and {j + 1})" for i, j in pairs)
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
        raise DataError(f"{columns.path}: columns {listed(map(brief, found))} mean one class; keep one")
    if not found:
        raise DataError(
            f"{columns.path}: no column for class {brief(names[0])}{did_you_mean(names[0], columns.names)}; "
            f"its columns are {listed(map(brief, columns.names))}; add it, or take the class out"
        )
    return found[0]


def _read_parquet(path: Path, file: BinaryIO) -> Any:
    """All rows, some at a time: a file of kilobytes may stand for terabytes, and its metadata need not say so."""
    content, size, most = pq.ParquetFile(file), 0, memory_of_machine() // 4
    batches: list[Any] = []
    for batch in content.iter_batches(_BATCH):
        size += batch.nbytes
        if size > most:
            raise DataError(
                f"{path}: takes more than {most / 1e9:,.1f} GB, a quarter of the memory, after "
                f"{_BATCH * len(batches):,} of {content.metadata.num_rows:,} rows; leave columns out that none needs"
            )
        batches.append(batch)
    return pa.Table.from_batches(batches, content.schema_arrow)


def _read_csv(path: Path, file: BinaryIO) -> Any:
    refuse_larger_than_memory(path, os.fstat(file.fileno()).st_size)
    delimiter, header = _header(path, file)
    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    file.seek(0)
    try:
        table = pyarrow.csv.read_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_LONGEST_ROW),  # threads: no row numbers
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                invalid_row_handler=refuse,
                newlines_in_values=True,  # else Arrow cuts rows in two wherever a block ends inside of quotes
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.large_string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if wrong:
            row = wrong[0]
            raise DataError(
                f"{path}, row {row.number}: {row.actual_columns} cells where the header has "
                f"{row.expected_columns}: {brief(row.text)}; correct it, or quote cells with {delimiter!r}"
            ) from error
        if "UTF8" in str(error):
            raise DataError(f"{path}{_not_utf8(file)}: is not UTF-8 text ({error}); save it as UTF-8") from error
        if "straddl" in str(error):
            raise DataError(
                f"{path}: a row has more than {_LONGEST_ROW:,} bytes; close its quotes, or shorten its cells"
            ) from error
        raise
    if table.column_names != header or any(column.type != pa.large_string() for column in table.columns):
        raise DataError(
            f"{path}, row 1: column names with line breaks, or with quotes that do not enclose the whole name: "
            f"{listed(map(brief, header))}; correct them"
        )
    _refuse_open_quote(path, file, table)
    return table


def _header(path: Path, file: BinaryIO) -> tuple[str, list[str]]:
    """Delimiter and column names."""
    raw = re.split(rb"[\r\n]", file.readline(_LONGEST_ROW), maxsplit=1)[0]
    if len(raw) == _LONGEST_ROW:
        raise DataError(
            f"{path}, row 1: has {_LONGEST_ROW:,} bytes and more, so it is no header; name the columns there"
        )
    try:
        line = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    if not line.strip():
        raise DataError(f"{path}: has no header in its first row; name the columns there")
    delimiter = next((mark for mark in DELIMITERS if len(next(csv.reader([line], delimiter=mark))) > 1), ",")
    return delimiter, next(csv.reader([line], delimiter=delimiter))


def _refuse_open_quote(path: Path, file: BinaryIO, table: Any) -> None:
    """Arrow takes the end of the file for the end of a quoted cell, which then has swallowed all rows in between."""
    if table.num_rows and re.search(r"[\r\n]", table.column(-1)[-1].as_py()):
        file.seek(-min(file.seek(0, 2), _LONGEST_ROW), 2)
        if not file.read().rstrip(b"\r\n").endswith(b'"'):
            raise DataError(
                f"{path}, row {table.num_rows + 1}: a quote that is not closed before the end of the file: "
                f"{brief(table.column(-1)[-1].as_py())}; close it"
            )


def _not_utf8(file: BinaryIO) -> str:
    """The first line that is not UTF-8, for a message."""
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return f", line {number}"
    return ""
