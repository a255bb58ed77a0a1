"""People's own tables, CSV and Parquet."""

from __future__ import annotations

import contextlib
import csv
import io
import posixpath
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers.table import Table
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, damage_bytes, damage_text, encoded, odd_text, pick

NAMES = [["image", "labels"], ["a.jpg", "cat;dog"], ["b.jpg", ""], ["sub/c.jpg", "none"], ["d.jpg", "dog"]]
COLUMNS = [["image", "cat", "dog"], ["a.jpg", "1", "0"], ["b.jpg", "", "-1"], ["c.jpg", "1.0", "True"]]
CLASS_FILE = b"cat: house cat\ndog: {synonyms: [hound]}\n"


def csv_rows(text: str, delimiter: str = ",") -> list[list[str]]:
    """All rows by Python's csv module, whose limit on cells holds for the whole process, so it is put back."""
    before = csv.field_size_limit(10**8)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    finally:
        csv.field_size_limit(before)


def stay_inside(table: AnnotationTable) -> None:
    """No path of the table may lead out of its root, and the table must be usable.

    Raises:
        Silence: One does.
    """
    for path in table.paths.tolist():
        if path.startswith("/") or ".." in path.split("/") or not path:
            raise Silence(f"{path!r} leaves the root")
    table.missing_files()
    table.digest()


def _check_labels(
    table: AnnotationTable, header: list[str], rows: list[list[str]], separator: str, other: dict[str, str]
) -> None:
    """Compares a table with a plain reading of its cells; ``other`` are synonyms."""

    def clean(text: str) -> str:
        return unicodedata.normalize("NFC", text).strip()

    header = [clean(name) for name in header]
    image = next(name for name in ("image", "path", "file", "filename") if name in header)
    for i, row in enumerate(rows):
        cells = dict(zip(header, row, strict=True))
        path = posixpath.normpath(cells[image].strip().replace("\\", "/"))
        if clean(str(table.paths[i])) != clean(path):
            raise Silence(f"row {i}: path {str(table.paths[i])!r}, expected {path!r}")
        if "labels" in header:
            named = {other.get(clean(name), clean(name)) for name in cells["labels"].split(separator)}
            known = bool(cells["labels"].strip())
            expected = [int(name in named) if known else -1 for name in table.class_names]
        else:
            by_name = {other.get(name, name): cell.strip() for name, cell in cells.items()}
            meaning = {
                "1": 1,
                "1.0": 1,
                "true": 1,
                "0": 0,
                "0.0": 0,
                "false": 0,
                "-1": -1,
                "-1.0": -1,
                "": -1,
                "nan": -1,
            }
            expected = [meaning[by_name[name].lower()] for name in table.class_names]
        if table.labels[i].tolist() != expected:
            raise Silence(f"row {i}: labels {table.labels[i].tolist()}, expected {expected}")


def _odd_cells(rng: Rng, rows: list[list[Any]], value: Any) -> list[list[Any]]:
    rows = [list(row) for row in rows]
    for _ in range(int(rng.integers(1, 4))):
        i = int(rng.integers(len(rows)))
        k = int(rng.integers(max(len(rows[i]), 1)))
        what = rng.integers(8)
        if what == 0:
            rows.insert(int(rng.integers(len(rows) + 1)), list(rows[i]))
        elif what == 1 and len(rows) > 1:
            del rows[i]
        elif what == 2:
            rows[i].insert(k, value(rng))
        elif what == 3 and rows[i]:
            del rows[i][k]
        elif rows[i]:
            rows[i][k] = value(rng)
    return rows


class CsvTables(Target):
    """``Table.train`` on damaged CSV files, with and without a class file."""

    name, share = "CSV tables", 12

    def __init__(self) -> None:
        super().__init__()
        self.base = {"classes.yaml": CLASS_FILE}

    def draw(self, rng: Rng) -> Case:
        """Cells, rows, quotes, delimiters or bytes damaged."""
        rows = pick(rng, (NAMES, COLUMNS))
        if rng.random() < 0.8:
            rows = _odd_cells(rng, rows, odd_text)
        buffer = io.StringIO()
        quoting = pick(rng, (csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE))
        try:
            csv.writer(
                buffer,
                delimiter=pick(rng, (",", ",", ";", "\t", "|", ":")),
                quoting=quoting,
                lineterminator=pick(rng, ("\n", "\r\n", "\r")),
            ).writerows(rows)
            text = buffer.getvalue()
        except csv.Error:  # cells that need quotes, without any
            text = "\n".join(",".join(row) for row in rows)
        chance = rng.random()
        if chance < 0.2:
            text = damage_text(rng, text)
        elif chance < 0.3:
            at = int(rng.integers(len(text) + 1))
            text = text[:at] + pick(rng, ('"', '""', "'", "\0", "\n\n", ",", '",', '\n"', "#", "\\")) + text[at:]
        elif chance < 0.32:
            at = int(rng.integers(len(text) + 1))
            text = text[:at] + "y" * int(rng.integers(100_000, 3_000_000)) + text[at:]
        options = {"class_file": bool(rng.random() < 0.3), "separator": pick(rng, (";", ";", ",", "|", "e"))}
        return Case({"t.csv": encoded(rng, text)}, options, ("t.csv",))

    def run(self, case: Case, folder: Path) -> None:
        """Rows and labels must be those that Python's csv module finds."""
        class_file = str(folder / "classes.yaml") if case.options["class_file"] else None
        table = Table(str(folder / "t.csv"), class_file=class_file, separator=case.options["separator"]).train()
        stay_inside(table)
        text = case.files["t.csv"].decode("utf-8-sig")
        header = text.replace("\r", "\n").split("\n", 1)[0]
        mark = next((m for m in (",", "\t", ";") if len(next(csv.reader([header], delimiter=m))) > 1), ",")
        rows = [row for row in csv_rows(text, mark) if row]
        if len(rows) - 1 != len(table):
            raise Silence(f"{len(table)} rows, where csv finds {len(rows) - 1}")
        if any(len(row) != len(rows[0]) for row in rows):
            raise Silence("a row of another length than the header")
        synonyms = {"hound": "dog"} if class_file else {}
        _check_labels(table, rows[0], rows[1:], case.options["separator"], synonyms)


class ParquetTables(Target):
    """``Table.train`` on Parquet files with odd types and values, or damaged bytes."""

    name, share = "Parquet tables", 8

    def __init__(self) -> None:
        super().__init__()
        self.base = {"classes.yaml": CLASS_FILE}

    def draw(self, rng: Rng) -> Case:
        """A file that Arrow writes from odd columns; half of them are damaged as bytes."""
        rows = pick(rng, (NAMES, COLUMNS))
        names = list(rows[0])
        columns: list[Any] = [pa.array(list(column)) for column in zip(*rows[1:], strict=True)]
        for _ in range(int(rng.integers(0, 3))):
            k = int(rng.integers(len(names)))
            if rng.random() < 0.2:
                names[k] = odd_text(rng).encode("utf-8", "replace").decode()
            with contextlib.suppress(pa.ArrowException, TypeError):  # cells that do not go into one column of this type
                columns[k] = self._odd_column(rng, columns[k])
        buffer = io.BytesIO()
        how = {"compression": pick(rng, ("none", "snappy", "zstd", "gzip")), "version": pick(rng, ("1.0", "2.6"))}
        try:
            pq.write_table(pa.table(columns, names=names), buffer, **how)
        except pa.ArrowException:  # a type that Parquet has not
            return self.draw(rng)
        content = buffer.getvalue()
        if rng.random() < 0.5:
            content = damage_bytes(rng, content, 3)
        return Case({"t.parquet": content}, {"class_file": bool(rng.random() < 0.3)}, ("t.parquet",))

    @staticmethod
    def _odd_column(rng: Rng, column: Any) -> Any:
        n = len(column)
        cells = column.to_pylist()
        cells[int(rng.integers(n))] = odd_text(rng).encode("utf-8", "replace").decode()
        kind = rng.integers(12)
        if kind == 0:
            return pa.array(cells).dictionary_encode()
        if kind == 1:
            return pa.array([str(cell).encode("utf-16") for cell in cells], pa.binary())
        if kind == 2:
            types = (pa.list_(pa.string()), pa.large_list(pa.string()))
            return pa.array([str(cell).split(";") for cell in cells], pick(rng, types))
        if kind == 3:
            return pa.array([{"a": cell} for cell in cells])
        if kind == 4:
            types = (pa.int64(), pa.int8(), pa.float32(), pa.uint32(), pa.timestamp("s"), pa.duration("s"), pa.date32())
            return pa.array([pick(rng, (0, 1, 1, 2, None)) for _ in cells], pick(rng, types))
        if kind == 5:
            return pa.nulls(n, pick(rng, (pa.null(), pa.string(), pa.list_(pa.string()))))
        if kind == 6:
            return pa.array([[[1]], None, [], [[2]]][:n] + [None] * (n - 4))
        if kind == 7:
            return pa.array([str(cell).encode()[:4].ljust(4) for cell in cells], pa.binary(4))
        if kind == 8:
            return pa.array([pick(rng, (0.0, 1.0, 0.5, float("nan"), float("inf"), None)) for _ in cells])
        if kind == 9:
            return pa.array([["cat", None], None, [], ["dog", "cat;dog"]][:n] + [None] * (n - 4), pa.list_(pa.string()))
        if kind == 10:
            return pa.array([None, *cells[1:]], pa.large_string())
        return pa.array(cells, pa.string())

    def run(self, case: Case, folder: Path) -> None:
        """Rows must be those of the file."""
        class_file = str(folder / "classes.yaml") if case.options["class_file"] else None
        table = Table(str(folder / "t.parquet"), class_file=class_file).train()
        stay_inside(table)
        content = pq.ParquetFile(folder / "t.parquet").read()
        if len(table) != content.num_rows:
            raise Silence(f"{len(table)} rows, but the file has {content.num_rows}")
        if all(column.type in (pa.string(), pa.large_string()) for column in content.columns):
            rows = [[cell or "" for cell in row] for row in zip(*(c.to_pylist() for c in content.columns), strict=True)]
            _check_labels(table, content.column_names, rows, ";", {"hound": "dog"} if class_file else {})
