"""Measures whether Grad-CAM, attention and value-path similarity show where an image shows its labels.

    uv run python benchmarks/localization.py --digits RUN [RUN ...] [--coco RUN [RUN ...] --coco_file FILE]

``--digits`` are runs of ``configs/quickstart.yaml`` with different seeds, such as::

    cbsa fit --config configs/quickstart.yaml --seed_everything 2 --compare false --report.enabled false

``--coco`` are runs on a data set in the COCO format, whose test annotations are in ``--coco_file``.

The maps of all labels of the test images with at least two labels are compared with the bounding boxes of these labels:

- *pointing*: how often the place with the highest value is inside a box of the label. A place is inside a box if its
  center is. A map without a positive value is a miss;
- *control*: the same with the map of another label of the image, which should rarely have its peak there;
- *energy*: the fraction of the sum of the map that is inside the boxes; 0 for a map without a positive value;
- *chance*: the fraction of the places that are inside the boxes, which is the pointing and energy of a uniform map;
- *center*: the pointing of a map with its peak at the center of the image;
- *possible*: how often any place is inside a box, which is the highest possible pointing.

*Small* labels have boxes that cover less than a quarter of the image. Labels that the network misses are included, and
*found* is restricted to labels whose score is at least the decision threshold. The values are means and standard errors
over the runs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from cells import mean_and_error
from measuring import markdown, where
from numpy.typing import NDArray

from cbsa_lightning.cli.check import source_of
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.labels.versions import checkpoint_of
from cbsa_lightning.inference.localization import label_maps
from cbsa_lightning.io.runs import CONFIG

torch.set_num_threads(1)

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of width and height."""


def inside(boxes: Sequence[Box], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns whether the center of each place ``(h, w)`` is inside one of the boxes."""
    ys, xs = ((np.arange(n) + 0.5) / n for n in grid)
    found = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes:
        found |= ((ys >= top) & (ys <= bottom))[:, None] & ((xs >= left) & (xs <= right))
    return found


def hit(heat: NDArray[np.floating], region: NDArray[np.bool_]) -> bool:
    """Returns whether the highest value is in the region; a map without a positive value misses it."""
    return bool(heat.max() > 0 and region.flat[heat.argmax()])


def energy(heat: NDArray[np.floating], region: NDArray[np.bool_]) -> float:
    """Returns the fraction of the sum of a non-negative map that is in the region; 0 for a map of zeros."""
    return float(heat[region].sum() / heat.sum()) if heat.max() > 0 else 0.0


def measure(
    classifier: Classifier, files: Sequence[Path], boxes: Sequence[Mapping[int, list[Box]]]
) -> dict[str, dict[str, float]]:
    """Returns the values in % of each kind of map, over the labels of images with at least two labels."""
    rows = [i for i, found in enumerate(boxes) if len(found) > 1]
    files, boxes = [files[i] for i in rows], [boxes[i] for i in rows]
    widest = max(map(len, boxes))
    classes = torch.tensor([[*sorted(found), *[min(found)] * (widest - len(found))] for found in boxes])
    predicted = (classifier.scores(files) >= classifier.thresholds).numpy()
    maps = label_maps(classifier, files, classes)
    kinds = {"Grad-CAM": maps.grad_cam, "attention": maps.attention, "value-path similarity": maps.similarity}
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i, found in enumerate(boxes):
        names = sorted(found)
        for j, k in enumerate(names):
            region = inside(found[k], tuple(maps.similarity.shape[2:]))
            small = sum((right - left) * (bottom - top) for left, top, right, bottom in found[k]) < 0.25
            center = tuple(n // 2 for n in region.shape)
            for kind, tensor in kinds.items():
                if tensor is None:
                    continue
                heat, other = tensor[i, j].numpy(), tensor[i, (j + 1) % len(names)].numpy()
                mine = values[kind]
                mine["pointing"].append(hit(heat, region))
                mine["control"].append(hit(other, region))
                mine["energy"].append(energy(heat, region))
                mine["zero maps"].append(heat.max() <= 0)
                if small:
                    mine["pointing, small"].append(hit(heat, region))
                if predicted[i, k]:
                    mine["pointing, found"].append(hit(heat, region))
                    mine["energy, found"].append(energy(heat, region))
            for kind, pointing in (("chance", region.mean()), ("center", region[center]), ("possible", region.any())):
                mine = values[kind]
                mine["pointing"].append(pointing)
                if small:
                    mine["pointing, small"].append(pointing)
                if predicted[i, k]:
                    mine["pointing, found"].append(pointing)
    for name in ("energy", "control"):
        values["chance"][name] = values["chance"]["pointing"]
    values["chance"]["energy, found"] = values["chance"]["pointing, found"]
    print(f"{len(files)} images, {len(values['chance']['pointing'])} labels", flush=True)
    return {kind: {name: 100 * float(np.mean(v)) for name, v in mine.items()} for kind, mine in values.items()}


def digit_boxes(source: object) -> list[dict[int, list[Box]]]:
    """Returns the boxes of the digits on the test canvases."""
    side = source.image_size
    return [
        {digit: [tuple(edge / side for edge in box)] for digit, box in found.items()} for found in source.boxes("test")
    ]


def coco_boxes(file: Path, table: object) -> list[dict[int, list[Box]]]:
    """Returns the boxes of the images of a table, by class."""
    content = json.loads(file.read_text())
    sizes = {image["id"]: image for image in content["images"]}
    category = {c["id"]: c["name"] for c in content["categories"]}
    found: dict[str, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for annotation in content["annotations"]:
        image = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        box = (x / image["width"], y / image["height"], (x + w) / image["width"], (y + h) / image["height"])
        k = table.class_names.index(category[annotation["category_id"]])
        found[image["file_name"]][k].append(box)
    return [found[Path(str(path)).name] for path in table.paths]


def of_run(run: Path, annotations: Path | None) -> dict[str, dict[str, float]]:
    """Returns the values of a run on its test images."""
    source, _ = source_of([str(run / CONFIG)])
    source.prepare()
    table = source.test()
    boxes = digit_boxes(source) if annotations is None else coco_boxes(annotations, table)
    return measure(Classifier.load(checkpoint_of(run)), [table.file(i) for i in range(len(table))], boxes)


COLUMNS = (*("pointing", "control", "energy", "pointing, small", "pointing, found", "energy, found", "zero maps"),)


def table(found: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the Markdown table of the runs of a data set."""
    lines = [
        [
            kind,
            *(mean_and_error(run[kind][name] for run in found) if name in found[0][kind] else "" for name in COLUMNS),
        ]
        for kind in found[0]
    ]
    return markdown(["map", *(f"{name}, %" for name in COLUMNS)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument("--coco", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument("--coco_file", type=Path, help="annotation file of the test images of --coco")
    args = parser.parse_args()
    print(where())
    for name, runs, file in (("digits", args.digits, None), ("photographs", args.coco, args.coco_file)):
        if runs:
            found = [of_run(run, file) for run in runs]
            print(f"\n{name}, {len(runs)} runs\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
