"""Writes the page of a table: a Markdown file, with CSV files and plots next to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from scipy.stats import kendalltau

from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.io.files import replacing
from cbsa_lightning.reproduce.cost import Cost
from cbsa_lightning.reproduce.paper import OURS, PAPER_COSTS, PAPER_ERRORS, Table
from cbsa_lightning.reproduce.recipes import Cell
from cbsa_lightning.reproduce.results import (
    Column,
    Finished,
    Means,
    markdown,
    mean_and_error,
    write_cells,
    write_pseudo_labels,
)
from cbsa_lightning.reproduce.table_pictures import draw_pseudo_labels, draw_table


def write_table(
    file: Path,
    table: Table,
    cells: Sequence[Cell],
    finished: Sequence[Finished],
    problems: Mapping[str, str],
    min_positives: int,
    settings: Mapping[str, str],
    cost: Mapping[str, Cost],
) -> None:
    """Writes ``file`` and, next to it, ``.csv``, ``.png``, ``_pseudo_labels.csv`` and ``_pseudo_labels.png``.

    Args:
        file: The Markdown file.
        table: The paper's table.
        cells: All cells of the table.
        finished: The finished cells.
        problems: Maps the names of cells that could not run to the reasons.
        min_positives: Minimum number of test positives for a class to be included in mAP.
        settings: Maps the names of the overlays of all cells to their content.
        cost: Cost of a step by system; empty if it was not measured.
    """
    rows = list(dict.fromkeys(cell.row.label for cell in cells))
    columns = list(dict.fromkeys((cell.data, cell.share) for cell in cells))
    means = Means(finished, lambda f: f.mAP(min_positives))
    parts = [
        _title(table),
        _introduction(cells, finished, min_positives),
        _grid(table, rows, columns, lambda row, column: _beside_paper(table, means, row, column)),
        _costs(cost),
        _order(table, means, rows, columns),
        _against_ours(table, means, rows, columns),
        "## Best on test\n\nThe highest test mAP of all epochs, of raw and averaged weights, as in CAP's program (only "
        "of averaged weights with `--min_positives` above 1). It is biased upward because the epoch is selected on the "
        "test images. Use it only to compare with papers that report it.",
        _grid(table, rows, columns, Means(finished, lambda f: f.best_on_test(min_positives)).text),
        "## All classes\n\nThe mean over all classes, with AP 0 for classes without test positives (the convention of "
        "CAP and torchmetrics).",
        _grid(table, rows, columns, Means(finished, lambda f: f.with_zeros(min_positives)).text),
        *_envelope(table, rows, columns, finished),
        _list("## Errors", problems),
        "## Settings of all cells\n\nThese overlays were applied after the method's overlay in `configs/methods`:",
        *(f"`{name}`\n\n```yaml\n{text.strip()}\n```" for name, text in settings.items()),
    ]
    with replacing(file) as draft:
        draft.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    _, cells_file, picture, pseudo_labels_file, pseudo_labels_picture = _files(file)
    write_cells(cells_file, table, finished, min_positives)
    write_pseudo_labels(pseudo_labels_file, finished)
    if finished:
        with replacing(picture) as draft:
            draw_table(table, means, rows, columns).savefig(draft, dpi=120)
        with replacing(pseudo_labels_picture) as draft:
            draw_pseudo_labels(table, finished, rows).savefig(draft, dpi=120)


def refuse_other_files(file: Path, table: Table) -> None:
    """Checks that :func:`write_table` would replace only files that it wrote itself.

    Args:
        file: The Markdown file to be written.
        table: The table.

    Raises:
        ConfigError: If it would replace another file.
    """
    try:
        ours = file.read_text(encoding="utf-8").startswith(_title(table))
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours and (others := [str(path) for path in _files(file) if path.exists()]):
        raise ConfigError(
            f"`cbsa table {table.number}` would replace {listed(others)}, which it did not write. Choose another "
            "folder with --out, or move these files."
        )


def _files(file: Path) -> tuple[Path, ...]:
    """Returns the Markdown file and the files next to it: cells, pseudo-labels and their plots."""
    pseudo_labels = file.with_name(f"{file.stem}_pseudo_labels")
    return file, *(part.with_suffix(suffix) for part in (file, pseudo_labels) for suffix in (".csv", ".png"))


def _title(table: Table) -> str:
    return f"# Table {table.number}: {table.title}"


def _introduction(cells: Sequence[Cell], finished: Sequence[Finished], min_positives: int) -> str:
    seeds = sorted({cell.seed for cell in cells})
    counted = "test positives" if min_positives == 1 else f"at least {min_positives} test positives"
    if len(seeds) == 1:
        values = f"values of the single seed {seeds[0]}, without a standard error"
    else:
        values = f"mean and, for two or more seeds, standard error over seeds {', '.join(map(str, seeds))}"
    text = (
        f"Test mAP in % of the averaged weights after the last epoch, over the classes with {counted}: {values}. The "
        f"paper's value and the difference from it are in parentheses. {len(finished)} of {len(cells)} cells are "
        "finished"
    )
    if finished:
        devices = sorted({f.found["device"] for f in finished})
        measured = sorted({f.found["measured_on"] for f in finished})
        text += f", on {', '.join(devices)}; measured on {' and '.join(measured)}"
    return ". ".join([text, *_unlike(finished)]) + "."


def _unlike(finished: Sequence[Finished]) -> Iterator[str]:
    """Yields warnings about cells that are not comparable for reasons that their recipes do not contain."""
    for data in dict.fromkeys(f.cell.data for f in finished):
        images = {str(f.found["images"]) for f in finished if f.cell.data == data}
        if len(images) > 1:
            yield f"**The images or labels of {data} changed between its cells**: delete the folders of the older cells"
    versions = sorted({" ".join(map(" ".join, sorted(f.found["versions"].items()))) for f in finished})
    if len(versions) > 1:
        yield f"**Cells were run with different versions**: {'; '.join(versions)}"


def _envelope(
    table: Table, rows: Sequence[str], columns: Sequence[Column], finished: Sequence[Finished]
) -> Iterator[str]:
    """Yields the section on interpolated AP, which the rows without a CLIP in Table 5 of the paper use."""
    if table.setting == "known_fraction":
        yield (
            "## Interpolated AP\n\nThe area under the precision envelope (VOC 2010). The paper's rows without a CLIP "
            "use this definition. Its rows with a CLIP use the AP of the first table, which is never higher."
        )
        yield _grid(table, rows, columns, Means(finished, Finished.envelope).text)


def _grid(table: Table, rows: Sequence[str], columns: Sequence[Column], text: Callable[[str, Column], str]) -> str:
    head = ["system", *(table.column(*column) for column in columns)]
    return markdown(head, ([row, *(text(row, column) for column in columns)] for row in rows))


def _beside_paper(table: Table, means: Means, row: str, column: Column) -> str:
    ours, theirs = means.mean(row, column), table.paper(row, *column)
    text = means.text(row, column)
    if theirs is None:
        return text
    reported = f"{theirs:.2f}"
    if table.number == 10:
        reported += f" ± {dict(zip(table.shares, PAPER_ERRORS, strict=True))[column[1]]}"
    return f"{text} ({reported})" if ours is None else f"{text} ({reported}, {ours - theirs:+.1f})"


def _order(table: Table, means: Means, rows: Sequence[str], columns: Sequence[Column]) -> str:
    """Returns the rank correlation of the systems with the paper for each column."""
    lines = []
    for data, share in columns:
        both = [
            (ours, theirs)
            for row in rows
            if (ours := means.mean(row, (data, share))) is not None
            and (theirs := table.paper(row, data, share)) is not None
        ]
        if len(both) > 2:
            tau = kendalltau(*zip(*both, strict=True)).statistic
            lines.append(f"{table.column(data, share)}: {tau:+.2f} ({len(both)} systems)")
    if not lines:
        return ""
    return (
        "Rank correlation of the systems with the paper (Kendall's tau; 1: same order, 0: unrelated, -1: reversed): "
        + "; ".join(lines)
    )


def _against_ours(table: Table, means: Means, rows: Sequence[str], columns: Sequence[Column]) -> str:
    """Returns the section with the differences between the last row and every other row, paired by seed."""
    last = rows[-1]

    def difference(row: str, column: Column) -> str:
        mine, other = (means.by_seed.get((label, column), {}) for label in (last, row))
        return mean_and_error((mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())), "+")

    if len(rows) < 2:
        return ""
    return f"## {last} minus each other system\n\nDifferences in mAP points for equal seeds:\n\n" + _grid(
        table, rows[:-1], columns, difference
    )


def _costs(cost: Mapping[str, Cost]) -> str:
    """Returns the section on cost: values per image and relative to the paper's method, here and in the paper."""
    if not cost:
        return ""
    head = ["system", "ms/image", "GB/image"]
    own, theirs = cost.get(OURS), PAPER_COSTS[OURS]
    lines = []
    for label, c in cost.items():
        line = [label, f"{c.ms:.2f}", f"{c.gb:.3f}"]
        if own is not None:
            paper = PAPER_COSTS.get(label)
            times = [f" ({of / whole:.2f})" for of, whole in zip(paper, theirs, strict=True)] if paper else ["", ""]
            line += [f"{c.ms / own.ms:.2f}{times[0]}", f"{c.gb / own.gb:.2f}{times[1]}"]
        lines.append(line)
    if own is not None:
        head += [f"time relative to {OURS} (paper)", f"memory relative to {OURS} (paper)"]
    return (
        "## Cost\n\nCost of a training step of the second stage: the minimum of three rounds in which all systems take "
        "turns. Memory is PyTorch's peak on a GPU, and otherwise the growth of the process during training. The "
        f"paper's values are for COCO on one RTX 3090.\n\n{markdown(head, lines)}"
    )


def _list(title: str, entries: Mapping[str, str]) -> str:
    return "\n".join([title, "", *(f"- {name}: {text}" for name, text in entries.items())]) if entries else ""
