"""The paper's tables: their systems, columns and reported values (mAP in %)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cbsa_lightning.errors import ConfigError

SHARES = (0.05, 0.10, 0.15, 0.20)
KNOWN_SHARES = (0.10, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70, 0.80)
Setting = Literal["labeled_fraction", "known_fraction"]
OURS = "Ours"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: The name in the paper.
        overlays: Names of YAML overlays in ``configs/methods``; later ones override earlier ones.
        settings: Arguments of the module that override the overlays.
    """

    label: str
    overlays: tuple[str, ...]
    settings: dict[str, int | str | bool] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        number: The number in the paper.
        title: The title.
        rows: The systems.
        reported: Maps (label, data set) to the values in the paper, one for each fraction, in %.
        data: The data sets, as names of overlays in ``configs/data``.
        shares: The labeled fractions, or the fractions of known labels.
        seeds: The seeds; 1 unless the paper reports several runs.
        setting: The argument of the data module that ``shares`` sets.
        clip: Model and weights of all rows that use a CLIP; None keeps those of the rows' overlays.
    """

    number: int
    title: str
    rows: tuple[Row, ...]
    reported: dict[tuple[str, str], tuple[float, ...]]
    data: tuple[str, ...]
    shares: tuple[float, ...] = SHARES
    seeds: tuple[int, ...] = (1,)
    setting: Setting = "labeled_fraction"
    clip: tuple[str, str] | None = None

    def column(self, data: str, share: float) -> str:
        """Returns the heading of a column."""
        return f"{data} {share_text(self.setting, share)}"

    def select(self, names: Sequence[str]) -> tuple[Row, ...]:
        """Returns rows by label; other names are overlays in ``configs/methods``, joined by "+" ("cbsa+mine")."""
        by_label = {row.label: row for row in self.rows}
        return tuple(by_label.get(name, Row(name, tuple(name.split("+")))) for name in names)

    def paper(self, label: str, data: str, share: float) -> float | None:
        """Returns the paper's value for a cell in %, or None if the paper has none."""
        values = self.reported.get((label, data))
        return dict(zip(self.shares, values, strict=True)).get(share) if values else None


def share_text(setting: Setting, share: float) -> str:
    """Returns a fraction as tables print it: "p = 0.05" or "10 % known"."""
    return f"p = {share:.2f}" if setting == "labeled_fraction" else f"{100 * share:g} % known"


CBSA = Row(OURS, ("cbsa",))
SYSTEMS = (
    Row("BCE", ("bce",)),
    Row("ASL", ("asl",)),
    Row("Top-1*", ("top_one",)),
    Row("Top-k*", ("top_k",)),
    Row("IAT*", ("iat",)),
    Row("CAP", ("cap",)),
    Row("DualCoOp", ("dualcoop",)),
    Row("SCPNet", ("scpnet",)),
    Row("TaI", ("tai",)),
    Row("DualCoOp++", ("dualcoop_plus",)),
    CBSA,
)


def _some(*labels: str) -> tuple[Row, ...]:
    by_label = {row.label: row for row in SYSTEMS}
    return tuple(by_label[label] for label in labels)


def _variant(label: str, **settings: int | str | bool) -> Row:
    return Row(label, ("cbsa",), settings)


TABLE_1 = Table(
    1,
    "Comparison on VOC and COCO",
    SYSTEMS,
    {
        ("BCE", "voc"): (67.95, 75.35, 78.19, 79.38),
        ("ASL", "voc"): (71.46, 78.00, 79.69, 80.77),
        ("Top-1*", "voc"): (77.89, 82.40, 83.44, 84.10),
        ("Top-k*", "voc"): (76.60, 80.44, 82.26, 83.30),
        ("IAT*", "voc"): (75.00, 77.63, 81.67, 82.77),
        ("CAP", "voc"): (76.16, 82.16, 83.48, 84.41),
        ("DualCoOp", "voc"): (79.16, 83.69, 84.55, 85.46),
        ("SCPNet", "voc"): (78.03, 78.70, 79.68, 80.30),
        ("TaI", "voc"): (79.14, 82.93, 84.14, 84.64),
        ("DualCoOp++", "voc"): (80.31, 83.79, 85.21, 85.90),
        (OURS, "voc"): (82.10, 84.82, 85.91, 86.85),
        ("BCE", "coco"): (58.90, 63.75, 65.91, 67.33),
        ("ASL", "coco"): (59.12, 63.82, 66.10, 67.51),
        ("Top-1*", "coco"): (59.94, 65.83, 67.81, 68.50),
        ("Top-k*", "coco"): (62.39, 66.97, 68.24, 68.66),
        ("IAT*", "coco"): (62.93, 66.18, 67.46, 68.56),
        ("CAP", "coco"): (62.43, 67.36, 69.11, 70.41),
        ("DualCoOp", "coco"): (65.81, 68.55, 69.61, 69.97),
        ("SCPNet", "coco"): (61.00, 62.11, 62.49, 62.81),
        ("TaI", "coco"): (67.02, 69.31, 69.94, 70.25),
        ("DualCoOp++", "coco"): (67.19, 69.10, 70.26, 70.67),
        (OURS, "coco"): (69.09, 71.86, 73.23, 74.28),
    },
    ("voc", "coco"),
)

TABLES = {
    table.number: table
    for table in (
        TABLE_1,
        Table(
            2,
            "Comparison on NUS-WIDE",
            tuple(row for row in SYSTEMS if row.label != "BCE"),
            {
                ("ASL", "nuswide"): (42.87, 46.50, 48.42, 49.65),
                ("Top-1*", "nuswide"): (39.39, 44.79, 46.65, 47.57),
                ("Top-k*", "nuswide"): (41.48, 45.89, 47.63, 47.78),
                ("IAT*", "nuswide"): (42.78, 45.83, 47.44, 48.02),
                ("CAP", "nuswide"): (44.82, 48.24, 49.90, 51.06),
                ("DualCoOp", "nuswide"): (46.92, 48.82, 49.94, 50.07),
                ("SCPNet", "nuswide"): (47.12, 48.89, 49.52, 49.96),
                ("TaI", "nuswide"): (48.90, 50.77, 51.88, 51.74),
                ("DualCoOp++", "nuswide"): (47.19, 48.81, 50.10, 50.41),
                (OURS, "nuswide"): (50.21, 51.65, 53.01, 53.78),
            },
            ("nuswide",),
        ),
        Table(
            3,
            "Ablation: target prompts (TP), semantic-aware alignment (SAA), context identification (CI)",
            (
                Row("CAP", ("cap",)),
                Row("TP", ("cbsa", "target_prompts_only")),
                Row("TP + SAA", ("cbsa", "without_contexts")),
                Row("TP + SAA + CI", ("cbsa",)),
            ),
            {
                ("CAP", "coco"): (62.43, 67.36, 69.11, 70.41),
                ("TP", "coco"): (67.02, 69.31, 69.94, 70.25),
                ("TP + SAA", "coco"): (68.65, 71.39, 72.96, 73.91),
                ("TP + SAA + CI", "coco"): (69.09, 71.86, 73.23, 74.28),
                ("CAP", "voc"): (76.16, 82.16, 83.48, 84.41),
                ("TP", "voc"): (79.14, 82.93, 84.14, 84.64),
                ("TP + SAA", "voc"): (80.40, 84.15, 85.67, 86.79),
                ("TP + SAA + CI", "voc"): (82.10, 84.82, 85.91, 86.85),
            },
            ("coco", "voc"),
        ),
        Table(
            4,
            "Number of contexts",
            (
                Row("K = 1", ("cbsa", "without_contexts")),  # bit-identical, because a single context has no effect
                _variant("K = 4", num_contexts=4),
                _variant("K = 6", num_contexts=6),
            ),
            {
                ("K = 1", "coco"): (68.65, 71.39, 72.96, 73.91),
                ("K = 4", "coco"): (69.01, 71.69, 73.20, 74.25),
                ("K = 6", "coco"): (69.09, 71.86, 73.23, 74.28),
            },
            ("coco",),
        ),
        Table(
            5,
            "Partial labels on COCO",
            (
                Row("SSGRL", ("ssgrl",)),
                Row("GCN-ML", ("gcn_ml",)),
                Row("SST", ("sst",)),
                Row("SARB", ("sarb",)),
                Row("HST", ("hst",)),
                Row("DSRB", ("dsrb",)),
                Row("DualCoOp", ("dualcoop", "partial_labels")),
                Row("SCPNet", ("scpnet", "partial_labels")),
                Row("Ours (SAA)", ("cbsa", "without_contexts", "partial_labels")),
            ),
            {
                ("SSGRL", "coco"): (62.5, 70.5, 73.2, 74.5, 76.3, 76.5, 77.1, 77.9),
                ("GCN-ML", "coco"): (63.8, 70.9, 72.8, 74.0, 76.7, 77.1, 77.3, 78.3),
                ("SST", "coco"): (68.1, 73.5, 75.9, 77.3, 78.1, 78.9, 79.2, 79.6),
                ("SARB", "coco"): (71.2, 75.0, 77.1, 78.3, 78.9, 79.6, 79.8, 80.5),
                ("HST", "coco"): (70.6, 75.8, 77.3, 78.3, 79.0, 79.4, 79.9, 80.2),
                ("DSRB", "coco"): (72.5, 76.0, 77.6, 78.7, 79.6, 79.8, 80.0, 80.5),
                ("DualCoOp", "coco"): (78.7, 80.9, 81.7, 82.0, 82.5, 82.7, 82.8, 83.0),
                ("SCPNet", "coco"): (80.3, 82.2, 82.8, 83.4, 83.8, 83.9, 84.0, 84.1),
                ("Ours (SAA)", "coco"): (79.8, 81.9, 83.5, 84.3, 84.4, 84.7, 85.0, 85.3),
            },
            ("coco",),
            shares=KNOWN_SHARES,
            setting="known_fraction",
            clip=("RN101-quickgelu", "openai"),
        ),
        Table(
            6,
            "Initialization of the prompts",
            (Row("Random", ("cbsa",)), _variant("Template", prompt_template="a photo of a")),
            {
                ("Random", "coco"): (69.09, 71.86, 73.23, 74.28),
                ("Template", "coco"): (68.89, 71.85, 73.22, 74.34),
            },
            ("coco",),
        ),
        Table(
            7,
            "Length of prompts",
            (
                _variant("8", prompt_length=8),
                Row("16", ("cbsa",)),
                *(_variant(str(length), prompt_length=length) for length in (32, 48, 64)),
            ),
            {
                ("8", "coco"): (69.17, 71.76, 73.18, 74.41),
                ("16", "coco"): (69.09, 71.86, 73.23, 74.28),
                ("32", "coco"): (68.91, 71.75, 73.27, 74.26),
                ("48", "coco"): (68.94, 71.92, 73.14, 74.34),
                ("64", "coco"): (69.09, 71.91, 73.26, 74.24),
            },
            ("coco",),
        ),
        Table(
            8,
            "Class-specific prompts (CSP) and shared prompts",
            (Row("CSP", ("cbsa",)), _variant("w/o CSP", shared_prompts=True)),
            {
                ("CSP", "coco"): (69.09, 71.86, 73.23, 74.28),
                ("w/o CSP", "coco"): (68.93, 71.52, 72.96, 74.13),
            },
            ("coco",),
        ),
        Table(
            9,
            "Cost of training",
            _some("CAP", "DualCoOp++", "TaI", "SCPNet", "DualCoOp", OURS),
            {
                ("CAP", "coco"): (62.43,),
                ("DualCoOp++", "coco"): (67.17,),  # 67.19 in Table 1
                ("TaI", "coco"): (67.02,),
                ("SCPNet", "coco"): (61.00,),
                ("DualCoOp", "coco"): (65.81,),
                (OURS, "coco"): (69.09,),
            },
            ("coco",),
            shares=(0.05,),
        ),
        Table(
            10,
            "Error bars",
            _some(OURS),
            {(OURS, "coco"): (69.05, 71.77, 73.15, 74.15)},
            ("coco",),
            seeds=(1, 2, 3),
        ),
    )
}

PAPER_COSTS = {
    "CAP": (2.436, 0.114),
    "DualCoOp++": (3.392, 0.107),
    "TaI": (3.046, 0.108),
    "SCPNet": (3.257, 0.113),
    "DualCoOp": (3.314, 0.107),
    OURS: (3.533, 0.120),
}
"""Table 9: training latency in ms and memory in GB, both per image, on COCO at p = .05 with one RTX 3090."""

PAPER_ERRORS = (0.064, 0.146, 0.357, 0.250)
"""Table 10: the values after "±". The paper calls them both a 95 % interval and a standard error."""


def table_of(number: int) -> Table:
    """Returns a table by its number.

    Raises:
        ConfigError: If the paper has no such table.
    """
    if number not in TABLES:
        raise ConfigError(f"There is no table {number}; choose one of {', '.join(map(str, TABLES))}.")
    return TABLES[number]
