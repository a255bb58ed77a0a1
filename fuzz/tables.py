"""People's own tables: CSV, Parquet and JSON lines."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import posixpath
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers.roles import IMAGE_COLUMNS, LABELS_COLUMNS
from cbsa_lightning.data.readers.table import Table
from cbsa_lightning.data.readers.words import UNLABELED
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, damage_bytes, damage_text, damage_tree, encoded, odd_text, pick

NAMES = [["image", "labels"], ["a.jpg", "cat;dog"], ["b.jpg", ""], ["sub/c.jpg", "none"], ["d.jpg", "dog"]]
COMMAS = [["image", "Tags"], ["a.jpg", "cat, dog"], ["b.jpg", "NA"], ["c.jpg", "dog"], ["c.jpg", "dog"]]
LISTS = [["file_name", "labels"], ["a.jpg", '["cat", "dog"]'], ["b.jpg", ""], ["c.jpg", "[]"], ["d.jpg", '["dog"]']]
ROWS = [["image", "label"], ["a.jpg", "cat"], ["a.jpg", "dog"], ["b.jpg", "none"], ["c.jpg", "dog"], ["d.jpg", ""]]
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


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _first(header: list[str], names: tuple[str, ...]) -> str | None:
    """The column that bears the first of ``names``, whatever its spelling."""
    keys = {re.sub(r"[\s_-]+", "", name).casefold(): name for name in reversed(header)}
    return next((name if name in header else keys[name] for name in names if name in keys), None)


def _names(cell: str, separator: str | None, known: set[str]) -> set[str]:
    """Names in a cell; without a separator, under the first reading that gives nothing but known names."""
    if separator is not None:
        return {_clean(name) for name in cell.split(separator)}
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(names := json.loads(cell), list) and all(isinstance(name, str) for name in names):
            return {_clean(name) for name in names}
    readings = [{_clean(cell)}, *({_clean(name) for name in cell.split(mark)} for mark in (";", "|", ",", None))]
    return next((names for names in readings if names <= known), readings[0])


def _expected(cells: dict[str, str], table: AnnotationTable, separator: str | None, other: dict[str, str]) -> list[int]:
    """Labels of one row by a plain reading of its cells; ``other`` are synonyms."""
    column = _first(list(cells), LABELS_COLUMNS)
    if column is not None:
        cell = _clean(cells[column])
        names = _names(cell, separator, {*table.class_names, *other})
        for word in (cell, *names) if len(names) == 1 else (cell,):  # a list may have a word as its only name
            if word.casefold() in UNLABELED or word == "None":
                return [-1] * table.num_classes
            if word in ("none", "[]"):
                return [0] * table.num_classes
        named = {other.get(name, name) for name in names}
        if separator is None and not named <= set(table.class_names):
            raise Silence(f"{cell!r} is read, but has other names than {table.class_names}")
        return [int(name in named) for name in table.class_names]
    by_name = {other.get(name, name): re.sub(r"\.0*$", "", cell.strip().lower()) for name, cell in cells.items()}
    meaning = {"1": 1, "true": 1, "0": 0, "false": 0} | dict.fromkeys(("-1", "none", *UNLABELED), -1)
    return [meaning[by_name[name]] for name in table.class_names]


def _check_labels(
    table: AnnotationTable, header: list[str], rows: list[list[str]], separator: str | None, other: dict[str, str]
) -> None:
    """Compares a table with a plain reading of its cells; rows of one image count together.

    Raises:
        Silence: A path or a label differs, or rows that contradict each other were merged.
    """
    header = [_clean(name) for name in header]
    image = _first(header, IMAGE_COLUMNS)
    expected: dict[str, list[list[int]]] = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        path = posixpath.normpath(cells[image or ""].strip().replace("\\", "/"))
        expected.setdefault(_clean(path), []).append(_expected(cells, table, separator, other))
    if (found := [_clean(path) for path in table.paths.tolist()]) != list(expected):
        raise Silence(f"paths {found}, expected {list(expected)}")
    for labels, (path, given) in zip(table.labels.tolist(), expected.items(), strict=True):
        if labels != [max(column) for column in zip(*given, strict=True)]:
            raise Silence(f"{path!r}: labels {labels}, expected {given}")
        contradict = any({0, 1} <= set(column) for column in zip(*given, strict=True))
        if contradict and any(row.count(1) != 1 for row in given):
            raise Silence(f"{path!r}: merged {given}, which contradict each other")


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
        rows = pick(rng, (NAMES, COMMAS, LISTS, ROWS, COLUMNS))
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
        options = {
            "class_file": bool(rng.random() < 0.3),
            "separator": pick(rng, (None, None, None, ";", ",", "|", "e")),
        }
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
        rows = pick(rng, (NAMES, COMMAS, LISTS, ROWS, COLUMNS))
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
        if len(table) > content.num_rows:
            raise Silence(f"{len(table)} rows, but the file has {content.num_rows}")
        if all(column.type in (pa.string(), pa.large_string()) for column in content.columns):
            rows = [[cell or "" for cell in row] for row in zip(*(c.to_pylist() for c in content.columns), strict=True)]
            _check_labels(table, content.column_names, rows, None, {"hound": "dog"} if class_file else {})


class JsonLines(Target):
    """``Table.train`` on damaged files with one JSON object a line."""

    name, share = "JSON lines", 4

    def draw(self, rng: Rng) -> Case:
        """Objects damaged as trees, lines as text."""
        header, *rows = pick(rng, (NAMES, COMMAS, LISTS, ROWS, COLUMNS))
        lines: Any = [dict(zip(header, row, strict=True)) for row in rows]
        for line in lines:
            if rng.random() < 0.5 and ";" in line.get("labels", ""):
                line["labels"] = line["labels"].split(";")
        if rng.random() < 0.7:
            lines = damage_tree(rng, lines, 2)
        lines = lines if isinstance(lines, list) else [lines]
        text = "\n".join(json.dumps(line, ensure_ascii=bool(rng.random() < 0.5)) for line in lines)
        if rng.random() < 0.2:
            text = damage_text(rng, text)
        return Case({"t.jsonl": encoded(rng, text)}, {}, ("t.jsonl",))

    def run(self, case: Case, folder: Path) -> None:
        """Rows and labels must be those of a plain reading of the lines."""
        table = Table(str(folder / "t.jsonl")).train()
        stay_inside(table)
        lines = case.files["t.jsonl"].decode("utf-8-sig").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
        header = list(dict.fromkeys(key for record in records for key in record))
        cells = [[_cell(record.get(key)) for key in header] for record in records]
        if len({_clean(key) for key in header}) == len(header):
            _check_labels(table, header, cells, None, {})


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
