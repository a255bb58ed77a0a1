"""`cbsa table N` writes the results of its cells and compares them with the paper's."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from PIL import Image
from scipy.stats import kendalltau

from cbsa_lightning.__main__ import main
from cbsa_lightning.errors import CBSAError, ConfigError
from cbsa_lightning.reproduce import cost, tables
from cbsa_lightning.reproduce.cost import Cost, costs, measure
from cbsa_lightning.reproduce.paper import CBSA, SYSTEMS, TABLES, Row
from cbsa_lightning.reproduce.recipes import Cell, DataSet, classes_of, make_cell
from cbsa_lightning.reproduce.results import Finished, Means
from cbsa_lightning.reproduce.table_page import refuse_other_files, write_table
from cbsa_lightning.reproduce.table_pictures import draw_pseudo_labels, draw_table
from tiny_tables import CONFIGS, short, tiny_voc, write_overlay

# From constructed results ----------------------------------------------------------------------------------------


def finished(label: str, AP: Sequence[float], seed: int = 1, data: str = "voc", share: float = 0.05) -> Finished:
    """A finished cell with AP values of "cat" in epochs 9, 10, ...; those of "dog" are 0.1 lower, "cow" has none."""
    epochs = [str(9 + i) for i in range(len(AP))]
    history = {
        "val/AP/cat": dict(zip(epochs, AP, strict=True)),
        "val/AP/dog": {epoch: value - 0.1 for epoch, value in zip(epochs, AP, strict=True)},
        "val/AP/cow": dict.fromkeys(epochs),
        "val/mAP": {epoch: value - 0.05 for epoch, value in zip(epochs, AP, strict=True)},
        "val/mAP_with_zeros": {epoch: value / 2 for epoch, value in zip(epochs, AP, strict=True)},
        "pseudo/CF1": {epoch: value / 4 for epoch, value in list(zip(epochs, AP, strict=True))[1:]},
        "time/ms_per_image": {"10": 2.5},
    }
    found = {
        "positives": {"cat": 5, "dog": 2, "cow": 0},
        "history": history,
        "device": "a machine",
        "measured_on": "test images",
        "images": ["a", "b"],
        "versions": {"torch": "2"},
    }
    return Finished(Cell(Row(label, (label,)), data, share, seed, {}), found)


def written(
    folder: Path,
    number: int,
    cells: Sequence[Cell],
    done: Sequence[Finished],
    problems: Mapping[str, str] | None = None,
    min_positives: int = 1,
    cost: Mapping[str, Cost] | None = None,
) -> str:
    file = folder / "out" / f"table_{number}.md"
    write_table(file, TABLES[number], cells, done, problems or {}, min_positives, {}, cost or {})
    return file.read_text()


def grids(text: str) -> dict[str, dict[str, list[str]]]:
    """Returns the tables of a Markdown text by heading, each as a mapping from row label to cells."""
    result: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| ") and not line.startswith("| ---"):
            label, *row = line.strip("| ").split(" | ")
            result.setdefault(heading, {})[label] = row
    return result


def test_values_of_a_cell() -> None:
    """Epochs are ordered as numbers, not as text; classes without positives are excluded."""
    cell = finished("a", [0.7, 0.9, 0.8])
    assert cell.mAP_by_epoch(1) == pytest.approx({9: 65, 10: 85, 11: 75})
    assert (cell.mAP(1), cell.mAP(2), cell.mAP(3)) == pytest.approx((75, 75, 80))
    assert (cell.best_on_test(2), cell.best_on_test(5)) == pytest.approx((85, 90))
    cell.found["history"]["val/mAP_raw"] = {"9": 0.65, "10": 0.88}
    assert (cell.best_on_test(1), cell.best_on_test(2)) == pytest.approx((88, 85))  # raw weights count, as in CAP
    assert cell.mAP(1) == pytest.approx(75)  # but never replace the averaged ones
    assert cell.with_zeros(1) == pytest.approx(40)
    assert math.isnan(cell.mAP(6))
    assert Means([cell], lambda f: f.mAP(6)).text("a", ("voc", 0.05)) == "-"


def test_means_and_standard_errors() -> None:
    runs = [finished("a", [AP], seed) for seed, AP in enumerate((0.50, 0.52, 0.57))] + [finished("b", [0.5], 1)]
    means, column = Means(runs, lambda f: f.mAP(1)), ("voc", 0.05)
    assert means.mean("a", column) == pytest.approx(48)
    assert means.error("a", column) == pytest.approx(statistics.stdev([45, 47, 52]) / 3**0.5)
    assert means.text("a", column) == "48.0 ± 2.1"
    assert (means.mean("b", column), means.error("b", column), means.text("b", column)) == (45, None, "45.0")
    assert (means.mean("b", ("voc", 0.1)), means.text("b", ("voc", 0.1))) == (None, "-")


def test_results_are_compared_with_the_paper(tmp_path: Path) -> None:
    """Covers unfinished cells, and fractions, systems and data sets that are not in the paper."""
    runs = [
        *(finished("Ours", [AP], seed) for seed, AP in ((1, 0.85), (2, 0.89))),
        finished("mine", [0.6]),
        finished("Ours", [0.7], data="digits"),
        finished("Ours", [0.8], share=0.3),
    ]
    cells = [run.cell for run in runs]
    missing = [finished("BCE", [0], data=data, share=share).cell for data, share in (("voc", 0.05), ("digits", 0.05))]
    text = written(tmp_path, 1, cells + missing, runs, {"BCE on voc": "WeightsError: no weights"})
    found = grids(text)
    title = "Table 1: Comparison on VOC and COCO"
    assert found[title]["system"] == ["voc p = 0.05", "digits p = 0.05", "voc p = 0.30"]
    assert found[title]["Ours"] == ["82.0 ± 2.0 (82.10, -0.1)", "65.0", "75.0"]
    assert found[title]["mine"] == ["55.0", "-", "-"]
    assert found[title]["BCE"] == ["- (67.95)", "-", "-"]
    assert found["Best on test"]["Ours"] == ["82.0 ± 2.0", "65.0", "75.0"]
    assert found["All classes"]["Ours"] == ["43.5 ± 1.0", "35.0", "40.0"]
    assert "5 of 7 cells are finished, on a machine; measured on test images." in text
    assert "standard error over seeds 1, 2." in text
    assert "over the classes with test positives" in text
    assert "## Errors\n\n- BCE on voc: WeightsError: no weights" in text
    assert "Kendall" not in text  # two systems are too few for a rank correlation
    assert "## Cost" not in text
    for name in ("table_1.png", "table_1_pseudo_labels.png"):
        assert Image.open(tmp_path / "out" / name).width > 200


def test_values_of_a_single_seed_have_no_standard_error(tmp_path: Path) -> None:
    run = finished("Ours", [0.85], 3)
    text = written(tmp_path, 1, [run.cell], [run])
    assert "with test positives: values of the single seed 3, without a standard error. The paper's value" in text
    assert "over seeds" not in text


def test_a_table_without_finished_cells(tmp_path: Path) -> None:
    text = written(tmp_path, 2, [finished("CAP", [0], data="nuswide").cell], [])
    assert grids(text)["Table 2: Comparison on NUS-WIDE"]["CAP"] == ["- (44.82)"]
    assert "0 of 1 cells are finished." in text
    assert "## Errors" not in text
    assert (tmp_path / "out" / "table_2.csv").read_text().count("\n") == 1
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("name", ["table_4.md", "table_4.csv", "table_4.png", "table_4_pseudo_labels.csv"])
def test_other_files_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"would replace .*{name}, which it did not write"):
        main(["table", "4", "--out", str(tmp_path), "--configs", str(CONFIGS)])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_earlier_table_is_replaced(tmp_path: Path) -> None:
    done = [finished("CBSA", [0.5])]
    first = written(tmp_path, 4, [run.cell for run in done], done)
    file = tmp_path / "out" / "table_4.md"
    refuse_other_files(file, TABLES[4])
    assert written(tmp_path, 4, [run.cell for run in done], done) == first
    with pytest.raises(ConfigError, match=r"table_4\.md"):
        refuse_other_files(file, TABLES[1])


def test_error_bars_of_the_paper(tmp_path: Path) -> None:
    runs = [finished("Ours", [0.7531], seed, "coco", 0.15) for seed in (1, 2)]
    text = written(tmp_path, 10, [run.cell for run in runs], runs)
    assert grids(text)["Table 10: Error bars"]["Ours"] == ["70.3 ± 0.0 (73.15 ± 0.357, -2.8)"]
    assert "minus each other" not in text


def test_min_positives(tmp_path: Path) -> None:
    runs = [finished("Ours", [0.9, 0.85])]
    text = written(tmp_path, 1, [runs[0].cell], runs, min_positives=3)
    assert grids(text)["Table 1: Comparison on VOC and COCO"]["Ours"] == ["85.0 (82.10, +2.9)"]
    assert grids(text)["Best on test"]["Ours"] == ["90.0"]
    assert "over the classes with at least 3 test positives" in text


def test_cells_that_are_not_comparable_are_reported(tmp_path: Path) -> None:
    runs = [finished("a", [0.5]), finished("b", [0.5])]
    assert "changed" not in written(tmp_path, 1, [run.cell for run in runs], runs)
    runs[1].found.update(images=["a", "c"], versions={"torch": "3"})
    text = written(tmp_path, 1, [run.cell for run in runs], runs)
    assert "**The images or labels of voc changed between its cells**" in text
    assert "different versions**: torch 2; torch 3" in text


def test_rank_correlation_of_the_systems(tmp_path: Path) -> None:
    """Kendall's tau equals a count of pairs, and excludes systems that are not in the paper."""
    ours = {"BCE": 0.7, "ASL": 0.6, "CAP": 0.8, "Ours": 0.85, "mine": 0.1}
    paper = {"BCE": 67.95, "ASL": 71.46, "CAP": 76.16, "Ours": 82.10}
    runs = [finished(label, [AP]) for label, AP in ours.items()]
    text = written(tmp_path, 1, [run.cell for run in runs], runs)
    pairs = [(ours[a] - ours[b]) * (paper[a] - paper[b]) > 0 for a, b in combinations(paper, 2)]
    tau = (2 * sum(pairs) - len(pairs)) / len(pairs)
    assert tau == pytest.approx(kendalltau([ours[name] for name in paper], list(paper.values())).statistic)
    assert f"voc p = 0.05: {tau:+.2f} (4 systems)" in text
    assert f"{tau:+.2f}" == "+0.67"


def test_differences_between_the_last_row_and_the_others(tmp_path: Path) -> None:
    """Differences are computed over the seeds that both rows have."""
    runs = [finished("CAP", [AP], seed) for seed, AP in ((1, 0.5), (2, 0.6), (3, 0.1))]
    runs += [finished("Ours", [AP], seed) for seed, AP in ((1, 0.58), (2, 0.62), (4, 0.9))]
    text = written(tmp_path, 1, [*(run.cell for run in runs), finished("TaI", [0]).cell, runs[-1].cell], runs)
    found = grids(text)["TaI minus each other system"]
    assert found == {"system": ["voc p = 0.05"], "CAP": ["-"], "Ours": ["-"]}
    text = written(tmp_path, 1, [run.cell for run in runs], runs)
    assert grids(text)["Ours minus each other system"]["CAP"] == ["+5.0 ± 3.0"]


def test_csv_of_cells_and_of_pseudo_labels(tmp_path: Path) -> None:
    runs = [finished("Ours", [0.7, 0.9, 0.8], 2), finished("mine", [0.5], data="digits")]
    written(tmp_path, 1, [run.cell for run in runs], runs)
    with (tmp_path / "out" / "table_1.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first == {
        **{"system": "Ours", "data": "voc", "p": "0.05", "seed": "2", "mAP": "75.000", "mAP_with_zeros": "40.000"},
        **{"best_on_test": "85.000", "CF1_at_half": "", "OF1_at_half": "", "pseudo_CF1": "20.000"},
        "mAP_envelope": "",
        **{"ms_per_image": "2.5", "paper_mAP": "82.1", "device": "a machine", "folder": runs[0].cell.folder},
    }
    assert (second["system"], second["mAP"], second["paper_mAP"], second["pseudo_CF1"]) == ("mine", "45.000", "", "")
    lines = (tmp_path / "out" / "table_1_pseudo_labels.csv").read_text().splitlines()
    assert lines == [
        "system,data,p,seed,epoch,CF1,precision,recall,coverage",
        "Ours,voc,0.05,2,10,22.500,,,",
        "Ours,voc,0.05,2,11,20.000,,,",
    ]


def test_plots_show_the_same_values() -> None:
    runs = [finished("CAP", [0.5, 0.6], 1), finished("CAP", [0.5, 0.8, 0.8], 2), finished("mine", [0.7, 0.9, 0.8], 1)]
    means = Means(runs, lambda f: f.mAP(1))
    (panel,) = draw_table(TABLES[1], means, ["CAP", "mine"], [("voc", 0.05)]).axes
    here, paper = (next(line for line in panel.lines if line.get_marker() == marker) for marker in "oD")
    assert here.get_xydata().tolist() == [[pytest.approx(65), 1], [pytest.approx(75), 0]]
    assert paper.get_xydata().tolist() == [[76.16, 1]]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["CAP", "mine"]
    (bar,) = (s for s in panel.collections[0].get_segments() if s[0, 1] == 1)
    assert bar[:, 0].tolist() == pytest.approx([55, 75])

    (panel,) = draw_pseudo_labels(TABLES[1], runs, ["CAP", "mine"]).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert curves == {"CAP": [[10, pytest.approx(17.5)]], "mine": [[10, pytest.approx(22.5)], [11, pytest.approx(20)]]}


def test_costs_are_compared_with_the_paper(tmp_path: Path) -> None:
    cells = [finished(label, [0], data="coco").cell for label in ("CAP", "Ours", "mine")]
    measured = {"CAP": Cost(1.0, 0.3), "Ours": Cost(4.0, 0.1), "mine": Cost(2.0, 0.05)}
    text = written(tmp_path, 9, cells, [], cost=measured)
    found = grids(text)["Cost"]
    assert found["system"][-2:] == ["time relative to Ours (paper)", "memory relative to Ours (paper)"]
    assert found["CAP"] == ["1.00", "0.300", "0.25 (0.69)", "3.00 (0.95)"]  # 2.436 / 3.533 and .114 / .120
    assert found["Ours"] == ["4.00", "0.100", "1.00 (1.00)", "1.00 (1.00)"]
    assert found["mine"] == ["2.00", "0.050", "0.50", "0.50"]
    del measured["Ours"]
    found = grids(written(tmp_path, 9, cells, [], cost=measured))["Cost"]
    assert found == {"system": ["ms/image", "GB/image"], "CAP": ["1.00", "0.300"], "mine": ["2.00", "0.050"]}


# From runs -------------------------------------------------------------------------------------------------------


def fails(*_: Any, **__: Any) -> None:
    raise AssertionError("this must not be called")


class Bench:
    """A folder in which `cbsa table` runs on a tiny VOC, with an additional overlay "mine"."""

    def __init__(self, folder: Path, clip: Path) -> None:
        self.configs, self.out = folder / "configs", folder / "out"
        shutil.copytree(CONFIGS, self.configs)
        arguments = {"clip": "RN50-quickgelu", "prompt_length": 2, "num_contexts": 0}
        write_overlay(
            self.configs / "methods" / "mine.yaml",
            model={"class_path": "cbsa_lightning.CBSAModule", "init_args": arguments},
        )
        self.short = short(folder, 2)
        self.options = [
            *("--data", f"voc={tiny_voc(folder)}", "--shares", "0.2", "--config", str(self.short)),
            *("--clip", str(clip), "--configs", str(self.configs), "--out", str(self.out)),
        ]

    def __call__(self, *more: str, number: int = 1) -> Path:
        return main(["table", str(number), *self.options, *more])

    def results(self) -> dict[tuple[str, int], dict[str, Any]]:
        found = [json.loads(file.read_text()) for file in self.out.glob("*/result.json")]
        return {(result["row"], result["seed"]): result for result in found}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), clip_folder)


@pytest.fixture(scope="module")
def stopped(bench: Bench) -> str:
    """Runs three systems with two seeds; the weights of one are unavailable. Returns the error message."""
    with pytest.raises(ConfigError) as stop:
        bench("--rows", "mine", "BCE", "Ours", "--seeds", "1", "2")
    return str(stop.value)


def expected(bench: Bench, label: str, least: int = 1) -> dict[str, list[float]]:
    """Computes the expected values by seed, from ``result.json`` only."""
    figures: dict[str, list[float]] = {"last": [], "best": [], "zeros": []}
    for seed in (1, 2):
        found = bench.results()[label, seed]
        counted = [name for name, number in found["positives"].items() if number >= least]
        by_epoch = [
            100 * statistics.mean(found["history"][f"val/AP/{name}"][epoch] for name in counted) for epoch in "01"
        ]
        figures["last"].append(by_epoch[1])
        raw = [100 * found["history"]["val/mAP_raw"][epoch] for epoch in "01"] if least == 1 else []
        figures["best"].append(max(*by_epoch, *raw))
        figures["zeros"].append(
            100
            / len(found["positives"])
            * sum(found["history"][f"val/AP/{name}"]["1"] or 0 for name in found["positives"])
        )
    return figures


def in_text(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values) / 2**0.5:.1f}"


def test_other_cells_run_if_some_cannot(bench: Bench, stopped: str) -> None:
    assert set(bench.results()) == {("mine", 1), ("mine", 2), ("Ours", 1), ("Ours", 2)}
    text = (bench.out / "table_1.md").read_text()
    for told in (stopped, text):
        for seed in (1, 2):
            assert f"- BCE on voc, p = 0.20, seed {seed}: WeightsError: the ImageNet weights" in told
        assert "Ways to obtain weights" in told
    assert "Ours on voc" not in stopped
    assert "4 of 6 cells are finished" in text
    assert not list(bench.out.glob("*/last.ckpt"))


def test_the_table_contains_the_results_of_the_cells(bench: Bench, stopped: str) -> None:
    found = grids((bench.out / "table_1.md").read_text())
    table = found["Table 1: Comparison on VOC and COCO"]
    mine, ours = expected(bench, "mine"), expected(bench, "Ours")
    assert ours["last"][0] != ours["last"][1]
    assert table["system"] == ["voc p = 0.20"]
    assert table["mine"] == [in_text(mine["last"])]
    assert table["Ours"] == [f"{in_text(ours['last'])} (86.85, {statistics.mean(ours['last']) - 86.85:+.1f})"]
    assert table["BCE"] == ["- (79.38)"]
    for label, figures in (("mine", mine), ("Ours", ours)):
        assert found["Best on test"][label] == [in_text(figures["best"])]
        assert found["All classes"][label] == [in_text(figures["zeros"])]
    differences = [a - b for a, b in zip(ours["last"], mine["last"], strict=True)]
    assert found["Ours minus each other system"] == {
        "system": ["voc p = 0.20"],
        "mine": [in_text(differences, "+")],
        "BCE": ["-"],
    }


def test_csv_files_and_plots_contain_the_results_of_the_cells(bench: Bench, stopped: str) -> None:
    with (bench.out / "table_1.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["system"], row["seed"]) for row in rows] == [(s, n) for n in "12" for s in ("mine", "Ours")]
    for row in rows:
        seed = int(row["seed"])
        figures, found = expected(bench, row["system"]), bench.results()[row["system"], seed]
        for column, name in (("mAP", "last"), ("best_on_test", "best"), ("mAP_with_zeros", "zeros")):
            assert float(row[column]) == pytest.approx(figures[name][seed - 1], abs=1e-3)
        for column, name in (("CF1_at_half", "val/CF1_at_half"), ("pseudo_CF1", "pseudo/CF1")):
            assert float(row[column]) == pytest.approx(100 * found["history"][name]["1"], abs=1e-3)
        assert row["paper_mAP"] == ("86.85" if row["system"] == "Ours" else "")
        assert (bench.out / row["folder"] / "result.json").is_file()
    with (bench.out / "table_1_pseudo_labels.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            history = bench.results()[row["system"], int(row["seed"])]["history"]
            for name in ("CF1", "precision", "recall", "coverage"):
                assert float(row[name]) == pytest.approx(100 * history[f"pseudo/{name}"][row["epoch"]], abs=1e-3)
    for name in ("table_1.png", "table_1_pseudo_labels.png"):
        assert Image.open(bench.out / name).width > 200


def test_the_page_lists_the_settings_of_all_cells(bench: Bench, stopped: str, clip_folder: Path) -> None:
    text = (bench.out / "table_1.md").read_text().partition("## Settings of all cells")[2]
    for name in ("tiny_voc.yaml", "short.yaml"):
        assert f"`{name}`\n\n```yaml\n{(bench.configs.parent / name).read_text().strip()}\n```" in text
    assert f"`--clip`\n\n```yaml\n{clip_folder.name}, weights: those of the folder\n```" in text


def test_finished_cells_are_only_read(bench: Bench, stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "make", fails)
    rows = ["--rows", "mine", "Ours", "--seeds", "1", "2"]
    assert bench(*rows) == bench.out / "table_1.md"
    file = bench(*rows, "--min_positives", "2")
    table = grids(file.read_text())["Table 1: Comparison on VOC and COCO"]
    assert table["mine"] == [in_text(expected(bench, "mine", 2)["last"])]
    assert expected(bench, "mine", 2)["last"] != expected(bench, "mine")["last"]
    # Rows of different tables with the same recipe share a cell.
    text = bench("--rows", "TP + SAA + CI", "TP", "--write_only", number=3).read_text()
    assert "1 of 2 cells are finished" in text
    found = grids(text)[f"Table 3: {TABLES[3].title}"]
    assert found["TP + SAA + CI"][0].startswith(f"{expected(bench, 'Ours')['last'][0]:.1f} (86.85")
    assert found["TP"] == ["- (84.64)"]


def test_a_locked_cell_is_reported_as_unfinished(
    bench: Bench, stopped: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cell is skipped, and the table reports it as unfinished."""
    data = DataSet("voc", bench.configs.parent / "tiny_voc.yaml")
    clip = (bench.options[bench.options.index("--clip") + 1], "openai")
    other = make_cell(CBSA, data, 0.2, 3, bench.configs, [bench.short], clip)
    (bench.out / other.folder).mkdir()
    with FileLock(bench.out / other.folder / ".lock"):
        text = bench("--rows", "Ours", "--seeds", "1", "3").read_text()
    assert "1 of 2 cells are finished" in text
    out = capsys.readouterr().out
    assert "Cell 1 of 1: Ours on voc, p = 0.20, seed 3\n... skipped: another process is running it\n" in out
    assert "contains 1 of 2 cells" in out


def test_invalid_options_of_table_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no table 11"):
        main(["table", "11"])
    with pytest.raises(ConfigError, match="min_positives is 0"):
        bench("--min_positives", "0")
    with pytest.raises(ConfigError, match=r"no row 'nothing'.*nothing\.yaml.*'Ours'"):
        bench("--rows", "nothing")
    with pytest.raises(ConfigError, match=r"no .*zoo\.yaml.*NAME=FILE"):
        main(["table", "1", "--data", "zoo", "--configs", str(bench.configs)])
    twice = f"voc={bench.configs / 'data' / 'voc.yaml'}"
    with pytest.raises(ConfigError, match="contains the same name twice"):
        main(["table", "1", "--data", twice, "voc", "--configs", str(bench.configs)])
    with pytest.raises(ConfigError, match="use both options"):
        main(["table", "1", "--pretrained", "openai", "--configs", str(bench.configs)])
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        with pytest.raises(ConfigError, match="one process"):
            bench("--write_only")
    with pytest.raises(SystemExit):
        bench("--nothing")


def test_partial_labels_under_both_definitions_of_ap(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row.label for row in TABLES[5].rows if "partial_labels" in row.overlays]
    bench("--shares", "0.5", "--rows", *rows, number=5)
    assert "Cell 1 of 3: DualCoOp on voc, 50 % known, seed 1" in capsys.readouterr().out
    bench("--shares", "0.8", "--rows", "DualCoOp", number=5)
    text = bench("--shares", "0.5", "0.8", "--rows", *rows, "--write_only", number=5).read_text()
    assert "4 of 6 cells are finished" in text
    assert "changed between its cells" not in text, "masks hide other labels of the same table"
    found = grids(text)
    assert found["Table 5: Partial labels on COCO"]["system"] == ["voc 50 % known", "voc 80 % known"]
    results = bench.out.glob("voc-known500-seed1-*/result.json")
    cells = {result["row"]: result["history"] for result in (json.loads(file.read_text()) for file in results)}
    assert set(cells) == set(rows)
    for label, history in cells.items():
        plain, envelope = (100 * history[f"val/{name}"]["1"] for name in ("mAP", "mAP_envelope"))
        assert found["Table 5: Partial labels on COCO"][label][0] == f"{plain:.1f}"
        assert found["Interpolated AP"][label][0] == f"{envelope:.1f}"
        assert envelope >= plain
        assert history["train/loss_unsup"]["1"] == 0


def test_overlays_with_the_same_name_are_both_listed(bench: Bench, tmp_path: Path) -> None:
    other = write_overlay(tmp_path / "short.yaml", data={"image_size": 32})
    text = bench("--rows", "Ours", "--config", str(bench.short), str(other), "--write_only").read_text()
    assert "max_epochs: 2" in text
    assert "image_size: 32" in text


# Cost ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cost")
    data, extra = DataSet("voc", tiny_voc(folder)), [short(folder, 2)]
    rows = {row.label: row for row in SYSTEMS if row.label in ("DualCoOp", "Ours")}
    clip = (str(clip_folder), "openai")
    return {label: make_cell(rows[label], data, 0.2, 1, CONFIGS, extra, clip).recipe for label in ("Ours", "DualCoOp")}


def test_costs_have_a_plausible_magnitude(recipes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Measures one system in a subprocess, like `cbsa table 9`, and one in this process."""
    found = costs({"Ours": recipes["Ours"]}, rounds=1, steps=1)
    assert list(found) == ["Ours"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipes["DualCoOp"]))
    here = measure(file, 1)  # the memory is 0 GB if this process has had a higher peak before
    assert 0.1 < found["Ours"].ms < 10_000
    assert 1e-6 < found["Ours"].gb < 1
    assert 0.1 < here.ms < 10_000


def test_systems_take_turns_and_the_minimum_is_returned(
    recipes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All measured recipes have random weights, and the given recipes are not modified."""
    before = json.dumps(recipes)
    seen: list[Any] = []
    said = iter(["[5, 2]", "[7, 1]", "[4, 3]", "[9, 4]"])

    def run(command: list[str], **_: Any) -> Any:
        assert command[-1] == "3"
        seen.append(classes_of(cost.yaml.safe_load(Path(command[-2]).read_text()))[-1]["init_args"])
        return subprocess.CompletedProcess(command, 0, f"Seed set to 1\n{next(said)}\n", "")

    monkeypatch.setattr(cost.subprocess, "run", run)
    assert costs(recipes, rounds=2, steps=3) == {"Ours": Cost(4, 2), "DualCoOp": Cost(7, 1)}
    assert ["num_contexts" in arguments for arguments in seen] == [True, False, True, False]
    assert [arguments["pretrained"] for arguments in seen] == ["random"] * 4
    assert json.dumps(recipes) == before


def test_costs_of_an_invalid_recipe_raise_an_error(
    recipes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(command: list[str], **_: Any) -> Any:
        try:
            measure(Path(command[-2]), int(command[-1]))
        except Exception:
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        raise AssertionError

    bad = json.loads(json.dumps(recipes["Ours"]))
    bad["model"]["init_args"]["num_contexts"] = 21
    monkeypatch.setattr(cost.subprocess, "run", here)
    with pytest.raises(
        CBSAError, match=r"The cost of bad could not be measured(.|\n)*21 contexts cannot be formed from 20"
    ):
        costs({"bad": bad}, rounds=1, steps=1)


def test_costs_belong_to_table_9(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured for all rows, stored, and read with ``--write_only``; the table also works without them."""
    asked: list[Any] = []
    monkeypatch.setattr(tables, "make", lambda *_: False)
    monkeypatch.setattr(
        tables, "costs", lambda recipes: asked.append(recipes) or {"Ours": Cost(2, 3), "CAP": Cost(1, 1)}
    )
    rows = ["--rows", "CAP", "Ours"]
    first = bench(*rows, number=9).read_text()
    assert [list(recipes) for recipes in asked] == [["CAP", "Ours"]]
    assert asked[0]["Ours"]["model"]["init_args"]["num_contexts"] == 2
    assert "| CAP | 1.00 | 1.000 | 0.50 (0.69) | 0.33 (0.95) |" in first
    monkeypatch.setattr(tables, "costs", fails)
    assert bench(*rows, "--write_only", number=9).read_text() == first

    def no_room(_: Any) -> None:
        raise CBSAError("no room")

    monkeypatch.setattr(tables, "costs", no_room)
    assert bench(*rows, number=9).read_text() == first  # measured once for the same cells
    rows += ["--seeds", "2"]
    with pytest.raises(ConfigError, match="Cost of a step: CBSAError: no room"):
        bench(*rows, number=9)
    text = (bench.out / "table_9.md").read_text()
    assert "- Cost of a step: CBSAError: no room" in text
    assert "## Cost\n" not in text
    bench(*rows, "--write_only")
    assert asked[1:] == []
