"""`cbsa figure N`: draws one of the paper's figures from a run, a table of results, or annotations."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from cbsa_lightning.arguments import check_number
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.cli.check import source_of
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.inference.contexts import context_probabilities
from cbsa_lightning.inference.localization import label_maps
from cbsa_lightning.io.files import replacing
from cbsa_lightning.method.contexts import cooccurrence, partition
from cbsa_lightning.reports.context_images import context_images
from cbsa_lightning.reports.localization import localization_gallery
from cbsa_lightning.reports.pictures import context_map
from cbsa_lightning.reproduce.figure_images import Model, images_of, load_model
from cbsa_lightning.reproduce.pseudo_label_curves import draw_points, read_points, write_points

HELP = """usage: cbsa figure N ... [--out FOLDER] [--format png|svg]

Draws a figure of the paper, and writes the data behind it as CSV.

  4 RUN             the images with the highest probability of each context
  5 FILE ...        the contexts of the classes, from annotations alone: --contexts K
  6 RUN|CSV ...     CF1 of the pseudo-labels, of runs or of a table of `cbsa table`
  7 RUN             where the images show their labels: Grad-CAM, attention, value-path similarity

  cbsa figure N --help    all options of a figure
"""


def figure_command(words: Sequence[str]) -> Path | None:
    """Runs `cbsa figure`.

    Args:
        words: Command-line arguments after ``figure``.

    Returns:
        The image file; None for help.

    Raises:
        ConfigError: If there is no such figure, or the arguments do not fit.
        CBSAError: See the functions that read models and data.
    """
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return None
    if words[0] not in FIGURES:
        raise ConfigError(
            f"There is no figure {words[0]!r}. `cbsa figure` draws figures {', '.join(FIGURES)}; the others of the "
            "paper are diagrams of the method."
        )
    figure, args = FIGURES[words[0]](words[1:])
    file = Path(args.out) / f"figure_{words[0]}.{args.format}"
    with replacing(file) as draft:
        figure.savefig(draft, dpi=110, format=args.format)
    print(f"Figure {words[0]}: {file}, and its data as {file.with_suffix('.csv').name}")
    return file


def _contexts_of_images(words: Sequence[str]) -> tuple[Figure, argparse.Namespace]:
    """Draws Fig. 4: the images with the highest probability of each context."""
    parser = _parser(4, "Draws the images with the highest probability of each context.")
    _add_model(parser)
    parser.add_argument("--count", type=int, default=5, help="images per context (default: 5)")
    parser.add_argument("--max_images", type=int, help="score only so many images, evenly spaced (default: all)")
    args = parser.parse_args(words)
    check_number("--count", args.count, 1, whole=True)
    if args.max_images is not None:
        check_number("--max_images", args.max_images, 1, whole=True)
    model = load_model(args.run)
    groups = _partition(model)
    files, names = images_of(model, args.images, args.max_images)
    values = context_probabilities(model.classifier, files).numpy()
    best = np.argsort(-values, axis=0, kind="stable")[: args.count]
    classes = [[n for n, k in zip(model.classifier.class_names, groups, strict=True) if k == c] for c in _ids(values)]
    rows = (
        [c + 1, "; ".join(classes[c]), rank + 1, names[i], f"{values[i, c]:.6f}"]
        for c in _ids(values)
        for rank, i in enumerate(best[:, c].tolist())
    )
    _write_csv(args, 4, ["context", "classes", "rank", "image", "probability"], rows)
    images = [[_view(model, files[i]) for i in best[:, c]] for c in _ids(values)]
    return context_images(images, [values[best[:, c], c].tolist() for c in _ids(values)], classes), args


def _contexts_of_classes(words: Sequence[str]) -> tuple[Figure, argparse.Namespace]:
    """Draws Fig. 5: the co-occurrence of the classes, ordered by context."""
    parser = _parser(5, "Draws the contexts of the classes of a data set, from the labels of its training images.")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a table, a COCO file, an export of a labeling tool, or configurations, as for `cbsa check`",
    )
    parser.add_argument("--contexts", type=int, metavar="K", help="number of contexts (default: model.num_contexts)")
    args = parser.parse_args(words)
    with redirect_stdout(sys.stderr):
        source, recipe = source_of(args.files)
        source.prepare()
        table = source.train()
    model = recipe.get("model")
    settings = (model.get("init_args") if isinstance(model, dict) else None) or {}
    number = settings.get("num_contexts") if args.contexts is None else args.contexts
    if not number:
        raise ConfigError(
            "The number of contexts is not set. Add --contexts K; the paper uses 6 on COCO, and 2 on VOC and NUS-WIDE."
        )
    check_number("--contexts", number, 1, whole=True)
    labels = torch.from_numpy(np.array(table.labels))
    S = cooccurrence(labels)
    groups = partition(S, number)
    positives = (labels == 1).sum(0).tolist()
    rows = (
        [name, int(k) + 1, positives[c], *(f"{value:.6f}" for value in S[c].tolist())]
        for c, (name, k) in enumerate(zip(table.class_names, groups, strict=True))
    )
    _write_csv(args, 5, ["class", "context", "images", *table.class_names], rows)
    return context_map(S, groups, table.class_names), args


def _pseudo_labels(words: Sequence[str]) -> tuple[Figure, argparse.Namespace]:
    """Draws Fig. 6: the CF1 of the pseudo-labels."""
    parser = _parser(6, "Draws the CF1 of the pseudo-labels of several runs, or of the cells of a table.")
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="RUN|CSV", help="folders of runs, or table_N_pseudo_labels.csv"
    )
    parser.add_argument(
        "--by",
        choices=["epoch", "fraction"],
        default="epoch",
        help="horizontal axis; fraction shows the last epoch (default: epoch)",
    )
    args = parser.parse_args(words)
    points = read_points(args.sources)
    figure = draw_points(points, args.by)
    with replacing(_csv(args, 6)) as draft:
        write_points(draft, points)
    return figure, args


def _locations(words: Sequence[str]) -> tuple[Figure, argparse.Namespace]:
    """Draws Fig. 7: where the images show their predicted labels."""
    parser = _parser(
        7, "Draws where images show their predicted labels, according to Grad-CAM, attention and value path."
    )
    _add_model(parser)
    parser.add_argument("--count", type=int, default=4, help="images, evenly spaced (default: 4)")
    parser.add_argument("--labels", type=int, default=2, help="labels per image, highest score first (default: 2)")
    args = parser.parse_args(words)
    check_number("--count", args.count, 1, whole=True)
    check_number("--labels", args.labels, 1, whole=True)
    model = load_model(args.run)
    classifier = model.classifier
    files, names = images_of(model, args.images, args.count)
    scores = classifier.scores(files)
    classes = scores.argsort(stable=True, dim=1, descending=True)[:, : args.labels]
    found = label_maps(classifier, files, classes)
    # The class with the highest score is always shown, further ones only if they are predicted.
    shown = scores.gather(1, classes) >= classifier.thresholds[classes]
    shown[:, 0] = True
    pairs = shown.nonzero().tolist()
    kinds = {"Grad-CAM": found.grad_cam, "attention": found.attention, "value-path similarity": found.similarity}
    maps = {
        kind: np.stack([tensor[i, j].numpy() for i, j in pairs]) for kind, tensor in kinds.items() if tensor is not None
    }
    labels = [classifier.class_names[int(classes[i, j])] for i, j in pairs]
    values = [float(scores[i, int(classes[i, j])]) for i, j in pairs]
    rows = (
        [names[i], label, f"{value:.6f}", kind, *place, f"{map_[place]:.6g}"]
        for kind, tensor in maps.items()
        for (i, _), label, value, map_ in zip(pairs, labels, values, tensor, strict=True)
        for place in np.ndindex(map_.shape)
    )
    _write_csv(args, 7, ["image", "label", "score", "map", "row", "column", "value"], rows)
    titles = [f"{label} {value:.2f}" for label, value in zip(labels, values, strict=True)]
    return localization_gallery([_view(model, files[i]) for i, _ in pairs], titles, maps), args


FIGURES: dict[str, Callable[[Sequence[str]], tuple[Figure, argparse.Namespace]]] = {
    "4": _contexts_of_images,
    "5": _contexts_of_classes,
    "6": _pseudo_labels,
    "7": _locations,
}


def _parser(number: int, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"cbsa figure {number}", description=description, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="output folder (default: runs/figures)")
    parser.add_argument("--format", choices=["png", "svg"], default="png", help="format of the image (default: png)")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or a checkpoint file")
    parser.add_argument("--images", type=Path, help="folder of images (default: the test images of the run)")


def _partition(model: Model) -> list[int]:
    """Returns the context of each class.

    Raises:
        ConfigError: If the model has no contexts.
    """
    groups = read_checkpoint(model.file)["state_dict"].get("context_partition")
    if not model.classifier.network.num_contexts or groups is None or bool((groups < 0).any()):
        raise ConfigError(
            f"{model.file} has no contexts. Use a run with context identification: `cbsa fit ... "
            "--model.init_args.num_contexts K`; the paper uses 6 on COCO, and 2 on VOC and NUS-WIDE."
        )
    return [int(k) for k in groups]


def _ids(values: Any) -> range:
    return range(values.shape[1])


def _view(model: Model, file: Path) -> Any:
    return model.classifier.view(file).permute(1, 2, 0).numpy()


def _csv(args: argparse.Namespace, number: int) -> Path:
    return Path(args.out) / f"figure_{number}.csv"


def _write_csv(args: argparse.Namespace, number: int, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replacing(_csv(args, number)) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(head)
        out.writerows(rows)
