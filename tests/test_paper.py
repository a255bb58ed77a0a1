"""The tables that `cbsa table` compares with contain exactly the paper's values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.reproduce.paper import KNOWN_SHARES, OURS, PAPER_COSTS, PAPER_ERRORS, SHARES, TABLES, Row, table_of

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT.parent / "shared" / "reference" / "paper.txt"
COLUMNS = {1: ("voc", "coco"), 2: ("nuswide",), 3: ("coco", "voc"), 9: (), 10: ("coco",)}  # the others: COCO only
TICKS = {0: "CAP", 1: "TP", 2: "TP + SAA", 3: "TP + SAA + CI"}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    if not PAPER.is_file():
        pytest.skip("the paper's text is not on this machine (../shared/reference/paper.txt)")
    return PAPER.read_text(encoding="utf-8").splitlines()


def printed(lines: list[str], number: int) -> dict[str, list[str]]:
    """Returns the cells of a printed table by row label. Its lines are the ones with tabs above the caption."""
    end = next(i for i, line in enumerate(lines) if line.startswith(f"Table {number}. "))
    while "\t" not in lines[end - 1]:
        end -= 1
    begin = end
    while "\t" in lines[begin - 1]:
        begin -= 1
    grid = [line.split("\t") for line in lines[begin:end]]
    if number == 2:  # this table has one column per system
        grid = [list(row) for row in zip(*grid, strict=True)]
    if number == 5:  # the first column is the data set
        grid = [row[1:] for row in grid]
    if number == 3:  # the first three columns have ticks instead of a label
        grid = [[TICKS[row[:3].count("✓")], *row[3:]] for row in grid]
    figures = re.compile(r"[\d.]+(±[\d.]+)?")
    return {
        re.sub(r" \[\d+\]|\$", "", label).replace("DualCoop", "DualCoOp"): cells
        for label, *cells in grid
        if label and all(figures.fullmatch(cell) for cell in cells)
    }


def test_all_tables() -> None:
    assert list(TABLES) == list(range(1, 11))


@pytest.mark.parametrize("number", TABLES)
def test_every_value_is_in_the_paper(number: int, lines: list[str]) -> None:
    table, found = TABLES[number], printed(lines, number)
    labels = [row.label for row in table.rows]
    assert labels == [label for label in found if label in labels or number != 5]
    for label, cells in found.items():
        if number == 9:
            *cost, mAP = map(float, cells)
            assert PAPER_COSTS[label] == tuple(cost)
            assert table.reported[label, "coco"] == (mAP,)
            continue
        values, errors = zip(*((*cell.split("±"), "0")[:2] for cell in cells), strict=True)
        if number == 10:
            assert tuple(map(float, errors)) == PAPER_ERRORS
        data = COLUMNS.get(number, ("coco",))
        shares = len(table.shares)
        assert len(cells) == shares * len(data)
        for i, name in enumerate(data):
            assert table.reported[label, name] == tuple(map(float, values[shares * i : shares * (i + 1)]))
    assert table.reported.keys() == {(label, data) for label in found for data in table.data}
    assert set(PAPER_COSTS) == {row.label for row in TABLES[9].rows}


@pytest.mark.parametrize("number", TABLES)
def test_the_fields_of_a_table_are_consistent(number: int) -> None:
    table = TABLES[number]
    assert table.number == number
    assert table.shares == {5: KNOWN_SHARES, 9: (0.05,)}.get(number, SHARES)
    assert table.seeds == ((1, 2, 3) if number == 10 else (1,))
    for row in table.rows:
        for data in table.data:
            values = [table.paper(row.label, data, share) for share in table.shares]
            assert values == list(table.reported[row.label, data])
        for overlay in row.overlays:
            assert (ROOT / "configs" / "methods" / f"{overlay}.yaml").is_file()
    for data in table.data:
        assert (ROOT / "configs" / "data" / f"{data}.yaml").is_file()


def test_settings_match_the_labels() -> None:
    table = TABLES[7]
    assert {row.label: row.settings.get("prompt_length") for row in table.rows if row.settings} == {
        label: int(label) for label in ("8", "32", "48", "64")
    }
    assert {row.label: row.settings.get("num_contexts") for row in TABLES[4].rows if row.settings} == {
        "K = 4": 4,
        "K = 6": 6,
    }


def test_nothing_is_reported_beyond_the_table() -> None:
    table = TABLES[1]
    assert table.paper(OURS, "voc", 0.05) == 82.10
    assert table.paper(OURS, "voc", 0.5) is None
    assert table.paper(OURS, "digits", 0.05) is None
    assert table.paper("mine", "voc", 0.05) is None


def test_select_accepts_labels_and_overlays() -> None:
    ours, mine = TABLES[1].select([OURS, "mine"])
    assert ours.overlays == ("cbsa",)
    assert mine == Row("mine", ("mine",))


@pytest.mark.parametrize("number", [0, 11, -1])
def test_unknown_tables_are_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=rf"no table {number}; choose one of.*1, 2, 3, 4, 5, 6, 7, 8, 9, 10\."):
        table_of(number)
    assert table_of(10) is TABLES[10]
