"""Compares labels in review order with the same number of random labels, using Label Studio's file formats.

    uv run python benchmarks/review_order.py --out DIR --photos DIR --clip DIR --seeds 1 2 3 --rounds 2

At the start, 5 % of the photographs in ``--photos`` (VOC layout) are labeled in an export of Label Studio. In each
round, `cbsa fit` trains stacked probes, `cbsa label` writes tasks, and this script answers ``--budget`` tasks with the
true labels: those with the lowest scores, or random ones. At the end, the script prints a table of the mAP in % on the
test photographs.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from cells import COUNTED, mean_and_error
from measuring import markdown, where

from cbsa_lightning.__main__ import main as cbsa
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.readers.voc import VOC
from cbsa_lightning.data.splits import split_labeled

ORDERS = ("review", "random")
SHARE = 0.05


def export(file: Path, table: AnnotationTable, answered: set[str]) -> None:
    """Writes an export with all images of a table and the true labels of the answered ones."""
    tasks = []
    for number, (path, row) in enumerate(zip(table.paths.tolist(), table.labels, strict=True), 1):
        names = [name for name, label in zip(table.class_names, row, strict=True) if label == 1]
        result = {"from_name": "labels", "to_name": "image", "type": "choices", "value": {"choices": names}}
        annotations = [{"id": number, "was_cancelled": False, "result": [result]}] if path in answered else []
        tasks.append({"id": number, "data": {"image": path, "path": path}, "annotations": annotations})
    file.write_text(json.dumps(tasks))


def interface(file: Path, class_names: tuple[str, ...]) -> None:
    """Writes the labeling interface, which lists the classes."""
    choices = "".join(f'<Choice value="{name}"/>' for name in class_names)
    controls = f'<Choices name="labels" toName="image" choice="multiple">{choices}</Choices>'
    file.write_text(f'<View><Image name="image" value="$image"/>{controls}</View>')


def fit(folder: Path, files: dict[str, Path], args: argparse.Namespace, seed: int, test: AnnotationTable) -> float:
    """Trains on an export; returns the mAP in % over the classes with at least :data:`COUNTED` test positives."""
    source = "--data.source.init_args"
    run = cbsa(
        [
            *("fit", "--config", "photos.yaml", "--config", "methods/stacked_probes.yaml"),
            "--data.source=LabelStudio",
            *(f"{source}.{name}={file}" for name, file in files.items()),
            f"--model.init_args.network.init_args.clip={args.clip}",
            f"--data.feature_cache.folder={args.features or args.out / 'features'}",
            *(f"--seed_everything={seed}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
            *("--trainer.logger=RunLogger", f"--trainer.logger.init_args.save_dir={folder}"),
            "--trainer.logger.init_args.name=run",
        ]
    )
    metrics = run.trainer.callback_metrics
    names = zip(test.class_names, (test.labels == 1).sum(0), strict=True)
    return 100 * float(np.mean([float(metrics[f"val/AP/{name}"]) for name, count in names if count >= COUNTED]))


def rounds(
    order: str, seed: int, args: argparse.Namespace, train: AnnotationTable, test: AnnotationTable
) -> list[float]:
    """Returns the mAP in % before the first round and after each round."""
    labeled = split_labeled(len(train), SHARE, seed, train.digest()).labeled
    answered, found = set(train.paths[labeled].tolist()), []
    rng = np.random.default_rng(seed)
    for number in range(args.rounds + 1):
        folder = args.out / f"{order}-{seed}-{number}"
        folder.mkdir(parents=True)
        files = {"train": folder / "train.json", "test": folder / "test.json", "label_config": folder / "labels.xml"}
        export(files["train"], train, answered)
        export(files["test"], test, set(test.paths.tolist()))
        interface(files["label_config"], train.class_names)
        found.append(fit(folder, files | {"root": Path(train.root)}, args, seed, test))
        print(f"{order}, seed {seed}, {len(answered)} labeled: mAP {found[-1]:.2f}", flush=True)
        tasks = folder / "tasks.json"
        cbsa(["label", str(folder / "run" / "version_0"), "--to", "label-studio", "--output", str(tasks)])
        offered: list[Any] = json.loads(tasks.read_text())
        offered.sort(key=lambda task: task["predictions"][0]["score"])
        chosen = range(args.budget) if order == "review" else rng.permutation(len(offered))[: args.budget]
        answered |= {offered[int(i)]["data"]["path"] for i in chosen}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="empty folder for exports and runs")
    parser.add_argument("--photos", required=True, help="folder that contains VOCdevkit")
    parser.add_argument("--clip", required=True, help="open_clip folder or name")
    parser.add_argument("--features", help="folder of cached features (default: in --out)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--budget", type=int, default=100)
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.environ.setdefault("MPLBACKEND", "Agg")
    print(where(), flush=True)
    source = VOC(args.photos)
    train, test = source.train(), source.test()
    assert test is not None
    found = {(order, seed): rounds(order, seed, args, train, test) for seed in args.seeds for order in ORDERS}
    lines = []
    for number in range(args.rounds + 1):
        columns = [[found[order, seed][number] for seed in args.seeds] for order in ORDERS]
        gains = [a - b for a, b in zip(*columns, strict=True)]
        lines.append([number * args.budget, *(mean_and_error(column) for column in columns), mean_and_error(gains)])
    print("\n" + markdown(["additional labels", *ORDERS, "difference"], lines))


if __name__ == "__main__":
    main()
