"""Reading of CSV, TSV, Parquet and JSON lines files as columns of text."""

from __future__ import annotations

import csv
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbsa_lightning.data.annotations import StringArray, repeated_rows
from cbsa_lightning.data.class_names import clean_name, did_you_mean, duplicates
from cbsa_lightning.data.readers.csv_file import read_csv
from cbsa_lightning.data.readers.json_lines import is_json_lines, read_json_lines
from cbsa_lightning.data.readers.shard_tables import read_shards
from cbsa_lightning.data.shards import SUFFIX
from cbsa_lightning.errors import DataError, listed
from cbsa_lightning.io.reading import brief, memory_of_machine, open_regular

_BATCH = 1 << 12  # number of rows of a Parquet file that are read at a time, so that even long texts fit into memory
_UNNAMED = re.compile(r"|Unnamed: [\d.]+|__index_level_\d+__")  # names that pandas gives to an unnamed index


@dataclass(frozen=True)
class Columns:
    """Content of a table file.

    Attributes:
        path: Path of the file.
        table: The columns. Those of a CSV or JSON lines file are text.
        first_row: Number of the first data row. In a CSV file, it is 2, since the header is row 1 (or 3 after a line
            ``sep=;``). In Parquet and JSON lines files, it is 1.
        from_csv: Whether it is a CSV file.
        files: If the table consists of several files, the name of each file and its first data row.
    """

    path: Path
    table: Any
    first_row: int
    from_csv: bool = False
    files: Sequence[tuple[str, int]] = ()

    @property
    def names(self) -> list[str]:
        """Column names."""
        return list(self.table.column_names)

    def where(self, i: int) -> str:
        """Describes the file and the row number of data row ``i``, for error messages."""
        return f"{self.path}, {self.row(i)}"

    def row(self, i: int) -> str:
        """Describes the row number of data row ``i``."""
        if not self.files:
            return f"row {i + self.first_row}"
        file, start = self.files[bisect_right(self.files, i, key=itemgetter(1)) - 1]
        return f"row {i - start + self.first_row} of {file}"

    def text(self, name: str) -> Any:
        """Returns a column as one array of text without surrounding white space. Null values are kept.

        Raises:
            DataError: If the column is damaged or cannot be converted to text, or a cell of a CSV file contains a line
                break, which usually means that a quote is not closed.
        """
        cells = pc.utf8_trim_whitespace(self._cast(name, pa.large_string()))
        if self.from_csv and (row := pc.index(pc.match_substring_regex(cells, r"[\r\n]"), True).as_py()) >= 0:
            raise DataError(
                f"{self.where(row)}: a cell in column {brief(name)} contains a line break: "
                f"{brief(cells[row].as_py())}; close the quotes, or remove the line break"
            )
        return cells

    def has_lists(self, name: str) -> bool:
        """Returns whether a column of a Parquet file contains lists."""
        kind = self.table.column(name).type
        return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))

    def lists(self, name: str) -> Any:
        """Returns a column that contains lists of names as one array of lists of text.

        Raises:
            DataError: If the lists do not contain text or the column is damaged.
        """
        return self._cast(name, pa.large_list(pa.large_string()))

    def _cast(self, name: str, kind: Any) -> Any:
        column = self.table.column(name)
        try:
            column.validate(full=True)  # texts in Parquet files are not validated when they are read
            column = column.cast(kind)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.path}: column {brief(name)} of type {brief(str(column.type))} is not text ({error}); convert it"
            ) from error
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)


def refuse_repeated_rows(columns: Columns, paths: StringArray) -> None:
    """Checks that no image has several rows.

    Raises:
        DataError: If an image has several rows. The message names the path and the rows.
    """
    if pairs := repeated_rows(paths):
        first = columns.first_row
        found = listed(f"{brief(str(paths[i]))} (rows {i + first} and {j + first})" for i, j in pairs)
        raise DataError(f"{columns.path}: images that occur twice: {found}; keep one row per image")


def read_columns(path: str | Path) -> Columns:
    """Reads a Parquet file (".parquet", ".pq"), JSON lines (".jsonl", ".ndjson", ".json"), shards or a CSV file.

    A name such as ``train-*.arrow`` is a pattern of shards; see ``read_shards``. Files with other suffixes are read as
    CSV files.

    A CSV file must be UTF-8 and have a header; see ``read_csv`` for its delimiter. Cells may be enclosed in double
    quotes. Empty lines are skipped and not counted as rows. A column without a name is omitted if it is empty (because
    of a delimiter at the end of each row) or contains row numbers (the index of pandas).

    Raises:
        DataError: If the file is missing, empty, not UTF-8 or too large for memory; has a repeated or unnamed column;
            has a row that is too long or has too few or too many cells; or has a quote that is not closed.
    """
    path = Path(path)
    try:
        columns = _read_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: the table does not exist; correct the path") from None
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"{path}: the file cannot be read as a table ({error}); correct the file") from error
    if not columns.table.num_rows:
        raise DataError(f"{path}: the table has a header but no rows; add rows")
    names = [clean_name(name) for name in columns.names]
    named = [k for k, name in enumerate(names) if not _UNNAMED.fullmatch(name) or _is_needed(columns, k, name)]
    names = [names[k] for k in named]
    if pairs := duplicates(names):
        found = listed(f"{brief(names[i])} (columns {named[i] + 1} and {named[j] + 1})" for i, j in pairs)
        raise DataError(f"{path}: columns that occur twice: {found}; rename or remove one of each")
    table = columns.table.select(named).rename_columns(names)
    return replace(columns, table=table)


def _read_file(path: Path) -> Columns:
    if path.suffix.lower() == SUFFIX:
        table, files = read_shards(path)
        return Columns(path, table, 1, files=files)
    with open_regular(path) as file:
        if path.suffix.lower() in (".parquet", ".pq"):
            return Columns(path, _read_parquet(path, file), 1)
        if is_json_lines(path, file):
            return Columns(path, read_json_lines(path), 1)
        return Columns(path, *read_csv(path, file), from_csv=True)


def column_named(columns: Columns, names: list[str]) -> str:
    """Returns the name of the column that has one of ``names``.

    Raises:
        DataError: If there is no such column, or there are several.
    """
    found = [name for name in names if name in columns.names]
    if len(found) > 1:
        raise DataError(
            f"{columns.path}: columns {listed(map(brief, found))} belong to the same class; keep one of them"
        )
    if not found:
        raise DataError(
            f"{columns.path}: there is no column for class {brief(names[0])}{did_you_mean(names[0], columns.names)}; "
            f"the columns are {listed(map(brief, columns.names))}; add the column, or remove the class"
        )
    return found[0]


def _is_needed(columns: Columns, k: int, name: str) -> bool:
    """Returns False if a column has no name and is empty or contains row numbers.

    Raises:
        DataError: If a column without a name has other content.
    """
    single = Columns(columns.path, columns.table.select([k]).rename_columns(["x"]), columns.first_row)
    cells = single.text("x").fill_null("")
    if pc.all(pc.equal(cells, "")).as_py():
        return False
    numbers = pc.all(pc.match_substring_regex(cells, r"^\d+$")).as_py()
    if (k == 0 or name) and numbers and pc.count_distinct(cells).as_py() == len(cells):
        return False
    row = pc.index(pc.not_equal(cells, ""), True).as_py()
    raise DataError(
        f"{columns.path}: column {k + 1} has no name ({brief(name)}), but cells such as {brief(cells[row].as_py())} "
        f"(row {row + columns.first_row}); name or remove the column. To omit an index of pandas, "
        "use to_csv(index=False)"
    )


def _read_parquet(path: Path, file: BinaryIO) -> Any:
    """Reads all rows in batches, since a small file may expand to terabytes, regardless of its metadata."""
    content, size, most = pq.ParquetFile(file), 0, memory_of_machine() // 4
    batches: list[Any] = []
    for batch in content.iter_batches(_BATCH):
        size += batch.nbytes
        if size > most:
            raise DataError(
                f"{path}: the table needs more than {most / 1e9:,.1f} GB, a quarter of the memory, after "
                f"{_BATCH * len(batches):,} of {content.metadata.num_rows:,} rows; remove columns that are not needed"
            )
        batches.append(batch)
    return pa.Table.from_batches(batches, content.schema_arrow)
