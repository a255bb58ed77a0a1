"""Reading of CSV files as Arrow tables of text. Rows that Arrow would misread raise an error."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.csv

from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, refuse_larger_than_memory

DELIMITERS = (",", "\t", ";")
LONGEST_ROW = 1 << 20  # bytes; Arrow's block size for CSV files and hence the maximum length of a row
_DELIMITER_LINE = re.compile(r'"?sep=([\t\x20-\x7e])"?', re.IGNORECASE)  # Excel's first line


class _Header(NamedTuple):
    names: list[str]
    delimiter: str
    row: int  # counted from 1


def read_csv(path: Path, file: BinaryIO) -> tuple[Any, int]:
    """Reads a UTF-8 file that has a header.

    If the first line specifies a delimiter, for example ``sep=;`` for Excel, this delimiter is used. Otherwise, the
    delimiter is the first of comma, tab and semicolon that splits the header into several names.

    Args:
        path: Path of the file, for error messages.
        file: The open file.

    Returns:
        The table, whose columns are text, and the number of its first row of data, counted from 1.

    Raises:
        DataError: If the file is empty, not UTF-8 or too large for memory, a row is too long or has a wrong number of
            cells, or a quote is not closed.
        pyarrow.ArrowException: If Arrow cannot read the file.
    """
    refuse_larger_than_memory(path, os.fstat(file.fileno()).st_size)
    header = _header(path, file)
    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    file.seek(0)
    try:
        table = pyarrow.csv.read_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False,  # with threads, row numbers are not available
                block_size=LONGEST_ROW,
                skip_rows=header.row - 1,
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=header.delimiter,
                invalid_row_handler=refuse,
                newlines_in_values=True,  # otherwise, Arrow splits rows if a block ends inside quotes
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(header.names, pa.large_string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if wrong:
            raise DataError(_wrong_length(path, wrong[0], header)) from error
        if "UTF8" in str(error):
            raise DataError(
                f"{path}{_not_utf8(file)}: the file is not UTF-8 text ({error}); save it as UTF-8"
            ) from error
        if "straddl" in str(error):
            raise DataError(
                f"{path}: a row has more than {LONGEST_ROW:,} bytes; close its quotes, or shorten its cells"
            ) from error
        raise
    if table.column_names != header.names or any(column.type != pa.large_string() for column in table.columns):
        raise DataError(
            f"{path}, row {header.row}: column names contain line breaks, or quotes that do not enclose the whole "
            f"name: {listed(map(brief, header.names))}; correct them"
        )
    _refuse_open_quote(path, file, table, header.row)
    return table, header.row + 1


def _header(path: Path, file: BinaryIO) -> _Header:
    line, row = _line(path, file, 1), 1
    if said := _DELIMITER_LINE.fullmatch(line.strip("\r\n ")):
        line, row = _line(path, file, 2), 2
    if not line.strip():
        raise DataError(f"{path}: the first row is not a header; write the names of the columns there")
    if said:
        delimiter = said[1]
    else:
        delimiter = next((mark for mark in DELIMITERS if len(next(csv.reader([line], delimiter=mark))) > 1), ",")
    return _Header(next(csv.reader([line], delimiter=delimiter)), delimiter, row)


def _line(path: Path, file: BinaryIO, row: int) -> str:
    """Returns the next line of the file without its line break."""
    raw = re.split(rb"[\r\n]", file.readline(LONGEST_ROW), maxsplit=1)[0]
    if len(raw) == LONGEST_ROW:
        raise DataError(
            f"{path}, row {row}: the row has {LONGEST_ROW:,} bytes or more, so it is not a header; name "
            "the columns there"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error}); save it as UTF-8") from error


def _wrong_length(path: Path, row: Any, header: _Header) -> str:
    """Returns the error message for a row whose number of cells differs from that of the header."""
    mark = header.delimiter
    remedy = f"correct it, or quote cells with {mark!r}"
    if row.actual_columns == row.expected_columns + 1 and row.text.rstrip("\r\n").endswith(mark):
        remedy = f"remove the {mark!r} at its end"
    return (
        f"{path}, row {row.number}: the row has {row.actual_columns} cells, but the header has {row.expected_columns}: "
        f"{brief(row.text)}; {remedy}"
    )


def _refuse_open_quote(path: Path, file: BinaryIO, table: Any, header_row: int) -> None:
    """Rejects a quote that is not closed, since Arrow would read all following rows as part of its cell."""
    if table.num_rows and re.search(r"[\r\n]", table.column(table.num_columns - 1)[-1].as_py()):
        file.seek(-min(file.seek(0, 2), LONGEST_ROW), 2)
        if not file.read().rstrip(b"\r\n").endswith(b'"'):
            raise DataError(
                f"{path}, row {table.num_rows + header_row}: a quote is not closed before the end of the file: "
                f"{brief(table.column(table.num_columns - 1)[-1].as_py())}; close it"
            )


def _not_utf8(file: BinaryIO) -> str:
    """Returns the number of the first line that is not UTF-8, for error messages."""
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return f", line {number}"
    return ""
