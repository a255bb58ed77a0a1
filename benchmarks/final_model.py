"""Compares the final model with simpler alternatives: mAP and calibration for several labeled fractions and seeds.

    uv run python benchmarks/final_model.py --out DIR --data digits photos --shares 0.05 0.1 0.2 --photos DIR --clip DIR

All networks have the same initial weights, stages and number of steps. On the photographs, stages and steps are those
of ``configs/photos.yaml``. The probes, the preset's network and the final model come from the same run. Finished runs
are read from ``final.jsonl`` and not repeated. The logits of each preset run are saved in ``logits-*.npz``. The script
prints the tables at the end.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from cells import (
    COUNTED,
    LABELED_PER_BATCH,
    SETTINGS,
    Cell,
    Results,
    arguments,
    cells,
    make_data,
    make_module,
    mean_and_error,
    trainer_settings,
)
from measuring import markdown, where
from torch import Tensor

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.method.labelers import ClassDistributionAware, Evidence, LabeledOnly
from cbsa_lightning.method.linear_probe import LinearProbe
from cbsa_lightning.method.metrics import MultilabelReport
from cbsa_lightning.method.stacking import StackedProbes

SETTINGS["photos"] = SETTINGS["photos"]._replace(warmup=12, epochs=6, strong_views=4)
DATA: dict[str, dict[str, Any]] = {
    "digits": {"min_steps_per_epoch": 10},
    "photos": {"min_steps_per_epoch": 20, "warmup_batch_size": 32},
}
# name: (labeler, labeled images per step or None for CAP's fraction)
RUNS: dict[str, tuple[Any, int | None]] = {
    "labeled only": (LabeledOnly(), None),
    "paper's recipe": (ClassDistributionAware(), None),
    "preset": (StackedProbes(), LABELED_PER_BATCH),
}
NETWORKS = [name for name in RUNS if name != "preset"]
COLUMNS = ["zero-shot", "linear probe", "stacked probes", *NETWORKS, "preset's network", "final"]


def run(name: str, cell: Cell, args: Any) -> dict[str, Any]:
    """Trains and evaluates one network; with the preset, also evaluates the probes and the final model."""
    labeler, labeled = RUNS[name]
    data = make_data(cell, args, labeled, **DATA[cell.data])
    preset = name == "preset"
    module = make_module(cell, args, data, labeler=labeler, ema_decay=None, stack_share=0.5 if preset else 0.0)
    probes = Probes(module, data) if preset else None
    trainer = L.Trainer(**trainer_settings(cell))
    trainer.fit(module, datamodule=data)
    table = data.eval_table()
    network, final, _ = scores_of(module, data.val_dataloader())
    figures = {"steps": trainer.global_step, "mAP": measured(network, table.labels)["mAP"]}
    if probes is None:
        return figures
    rows = data.split.unlabeled
    logits = {"network": network, "final": final, **probes.test, **probes.labeled}
    hidden = scores_of(module, data.plain_dataloader(rows))
    logits.update({f"unlabeled_{k}": v for k, v in zip(("network", "final", "index"), hidden, strict=True)})
    length = f"{SETTINGS[cell.data].warmup}-{SETTINGS[cell.data].epochs}"
    file = args.out / f"logits-{cell.data}-{cell.share}-{cell.seed}-{length}.npz"
    truth = {"truth": table.labels, "labels": data.labeled_targets(), "hidden": data.train_table.labels}
    np.savez_compressed(file, **{k: np.asarray(v) for k, v in {**logits, **truth}.items()})
    of = {"preset's network": network, "final": final, **probes.test}
    return {**figures, **{key: measured(value, table.labels) for key, value in of.items()}}


class Probes:
    """Logits of zero-shot CLIP, the linear probe and the stack, computed before training."""

    def __init__(self, module: CBSAModule, data: SSMLLDataModule) -> None:
        data.prepare_data()
        data.setup("fit")
        describe = module.network.describer()
        known = data.split.labeled
        order = np.concatenate([known, data.split.unlabeled])
        (descriptors, scores), (new, new_scores) = (
            _described(describe, module, loader) for loader in (data.plain_dataloader(order), data.val_dataloader())
        )
        labels = data.labeled_targets()
        evidence = Evidence(descriptors, scores, torch.arange(len(known)), labels)
        stack, linear = StackedProbes().fit(evidence), LinearProbe().fit(evidence)
        inputs = [part.numpy() for part in (*new, *new_scores)]
        self.test = {
            "zero-shot": new_scores[0],
            "linear probe": torch.from_numpy(linear.logits(inputs)),
            "stacked probes": torch.from_numpy(stack.logits(inputs)),
        }
        self.labeled = {"left_out": torch.from_numpy(stack.left_out())}


def _described(describe: Any, module: CBSAModule, loader: Any) -> tuple[list[Tensor], list[Tensor]]:
    found = [describe(module.features_of(batch)) for batch in loader]
    parts = zip(*((*d.descriptors, *d.scores) for d in found), strict=True)
    tables = [torch.cat(part) for part in parts]
    count = len(found[0].descriptors)
    return tables[:count], tables[count:]


@torch.no_grad()
def scores_of(module: CBSAModule, loader: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of the averaged network and of the final model, and the row indices of the images."""
    module.eval()
    module.cache_text()
    parts = []
    for batch in loader:
        features = module.features_of(batch)
        with torch.autocast("cpu", torch.bfloat16):
            network = module.score(features).logits
        parts.append((network.float(), module.fused_logits(features, network).float(), batch.index))
    network, final, index = (torch.cat(part) for part in zip(*parts, strict=True))
    return network, final, index


def measured(logits: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Returns the mAP in % over the classes with at least :data:`COUNTED` positives, and calibration metrics."""
    report = MultilabelReport(labels.shape[1], COUNTED)
    report.update(logits, torch.from_numpy(labels))
    found = report.compute()
    return {"mAP": 100 * float(found["mAP"]), "ECE": float(found["ECE"]), "Brier": float(found["Brier"])}


def tables(found: list[dict[str, Any]], wanted: list[tuple[str, float]]) -> str:
    """Returns the table of mAP, and the table of calibration metrics of the probes and the final model."""
    lines, calibration = [], []
    for data, share in wanted:
        mine = [r for r in found if (r["data"], r["share"]) == (data, share)]
        presets = [r for r in mine if r["run"] == "preset"]
        columns = {name: [r["mAP"] for r in mine if r["run"] == name] for name in NETWORKS}
        columns.update({k: [r[k]["mAP"] for r in presets] for k in COLUMNS if k not in columns})
        gaps = [r["final"]["mAP"] - r["stacked probes"]["mAP"] for r in presets]
        lines.append([data, share, *(mean_and_error(columns[k]) for k in COLUMNS), mean_and_error(gaps)])
        for key in ("ECE", "Brier"):
            shown = ("linear probe", "stacked probes", "preset's network", "final")
            values = [f"{np.mean([r[k][key] for r in presets]):.3f}" if presets else "-" for k in shown]
            calibration.append([data, share, key, *values])
    first = markdown(["data", "p", *COLUMNS, "final minus stack"], lines)
    second = markdown(["data", "p", "", "linear probe", "stacked probes", "preset's network", "final"], calibration)
    return f"{first}\n\n{second}"


def main() -> None:
    args = arguments(__doc__).parse_args()
    print(where(), flush=True)
    results = Results("final.jsonl", args)
    for cell in cells(args):
        for name in args.only or RUNS:
            if not results.has(name, cell):
                results.add(name, cell, run(name, cell, args))
    print("\n" + tables(results.read(), list(dict.fromkeys((c.data, c.share) for c in cells(args)))))


if __name__ == "__main__":
    main()
