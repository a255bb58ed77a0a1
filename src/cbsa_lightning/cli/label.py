"""`cbsa label`, which writes labels of a run's images or of new images as a file for a labeling tool."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.inference.labels.image_labels import ImageLabels, read_labels, write_labels
from cbsa_lightning.inference.labels.image_sizes import upright_sizes
from cbsa_lightning.inference.labels.project_tasks import Project, predictions_for_tasks
from cbsa_lightning.inference.labels.tools import (
    cvat_xml,
    fiftyone_labels,
    label_studio_config,
    label_studio_tasks,
    write_json,
    write_xml,
)
from cbsa_lightning.inference.labels.versions import checkpoint_of, version_of
from cbsa_lightning.io.runs import LABELS

SUFFIXES = {
    "label-studio": ".json",
    "cvat": ".xml",
    "fiftyone": ".json",
    "csv": ".csv",
    "parquet": ".parquet",
    "jsonl": ".jsonl",
}

URL = "/data/local-files/?d="
CONTROL = "labels"


def label(words: Sequence[str]) -> Path:
    """Runs `cbsa label`.

    Args:
        words: Command-line arguments after ``label``.

    Returns:
        The output file.

    Raises:
        ConfigError: If the output exists, or its suffix does not match the tool.
        DataError: If the run has no labels, or images cannot be read.
    """
    args = _parser().parse_args(words)
    output = Path(args.output)
    if output.suffix.lower() != SUFFIXES[args.to]:
        raise ConfigError(f"{output}: the suffix of files for {args.to} is {SUFFIXES[args.to]}; change --output.")
    if output.exists():
        raise ConfigError(f"{output} exists already. Choose another --output, or move the file.")
    _refuse_unused(args)
    labels = _labels(args)
    if args.tasks is not None:
        _write_predictions(args, labels, output)
        return output
    _write(args, labels, output)
    print(f"Labels of {len(labels.images)} images, of which {int(labels.review.any(1).sum())} need review: {output}")
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cbsa label",
        description="Writes labels for a labeling tool, either of a run's unlabeled images or of new images.",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/cbsa/version_0")
    parser.add_argument("--to", choices=list(SUFFIXES), required=True, help="tool or format")
    parser.add_argument("--output", required=True, help="output file")
    parser.add_argument("--images", help="folder of new images to label with the run's checkpoint")
    parser.add_argument("--root", type=Path, help="for --to cvat and --tasks: folder that contains the run's images")
    studio = parser.add_argument_group("Label Studio")
    studio.add_argument("--url", help=f"prefix of the path of an image (default: {URL}, its local storage)")
    studio.add_argument(
        "--control", help=f"name of the Choices control (default: {CONTROL}; with --tasks, the only one)"
    )
    studio.add_argument(
        "--tasks", type=Path, help="JSON export of a project, whose tasks get predictions; no new tasks are created"
    )
    studio.add_argument("--label_config", type=Path, help="with --tasks: XML of the project's labeling interface")
    studio.add_argument("--prefix", help="with --tasks: path or URL of --root in the project, such as photos")
    return parser


def _refuse_unused(args: argparse.Namespace) -> None:
    """Rejects options that have no effect because of another option."""
    studio, tasks = args.to == "label-studio", args.tasks is not None
    effective = {
        "--url": studio and not tasks,
        "--control": studio,
        "--tasks": studio,
        "--label_config": studio and tasks,
        "--prefix": studio and tasks,
        "--root": tasks or args.to == "cvat",
    }
    for option, has_effect in effective.items():
        if getattr(args, option[2:]) is not None and not has_effect:
            raise ConfigError(f"{option} has no effect here. Remove it; see `cbsa label --help`.")


def _labels(args: argparse.Namespace) -> ImageLabels:
    if args.images is not None:
        from cbsa_lightning.inference.labels.new_images import label_images  # imports torch

        return label_images(checkpoint_of(args.run), Path(args.images))
    file = args.run / LABELS
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist: {args.run} is not a finished run with unlabeled images, or it was run with "
            "--labels.enabled false. Use --images FOLDER to label images with its checkpoint."
        )
    return read_labels(file)


def _write(args: argparse.Namespace, labels: ImageLabels, output: Path) -> None:
    if args.to == "label-studio":
        control = args.control or CONTROL
        tasks = label_studio_tasks(labels, version_of(args.run), URL if args.url is None else args.url, control)
        write_json(output, tasks)
        interface = output.with_suffix(".xml")
        interface.write_text(label_studio_config(labels, control) + "\n", encoding="utf-8")
        print(f"Labeling interface of the project with all classes: {interface}")
        return
    writers: dict[str, Callable[[], None]] = {
        "cvat": lambda: write_xml(output, cvat_xml(labels, _sizes(args, labels))),
        "fiftyone": lambda: write_json(output, fiftyone_labels(labels)),
    }
    writers.get(args.to, lambda: write_labels(output, labels))()


def _write_predictions(args: argparse.Namespace, labels: ImageLabels, output: Path) -> None:
    root = _root(args) or args.tasks.parent
    project = Project(args.tasks, args.label_config, args.control, root, args.prefix)
    predictions, notes = predictions_for_tasks(labels, project, version_of(args.run))
    write_json(output, predictions)
    for note in notes:
        print(f"{args.tasks}: {note}")
    print(f"Predictions for {len(predictions)} tasks, to import at /api/projects/ID/import/predictions: {output}")


def _sizes(args: argparse.Namespace, labels: ImageLabels) -> list[tuple[int, int] | None] | None:
    """Returns the sizes of the images, and prints a note about unknown sizes."""
    root = _root(args)
    if root is None:
        print("The file contains no image sizes. To add them, pass the folder that contains the photos as --root.")
        return None
    sizes = upright_sizes([root / path for path in labels.images.tolist()])
    if unknown := [path for path, size in zip(labels.images.tolist(), sizes, strict=True) if size is None]:
        print(
            f"{len(unknown)} images below {root} are missing or unreadable. Their size is omitted: {listed(unknown, 5)}"
        )
    return sizes


def _root(args: argparse.Namespace) -> Path | None:
    """Returns the folder that the image paths are relative to, if an option sets it."""
    root: Path | None = args.root
    if root is None and args.images is not None:
        images = Path(args.images)
        return images if images.is_dir() else images.parent
    return root
