"""Reads a file of `cbsa label` with the corresponding labeling tool, and compares its labels with the run's labels.csv.

    cbsa label RUN --to cvat --root IMAGES --output annotations.xml
    python scripts/read_back.py datumaro annotations.xml IMAGES RUN/labels.csv

Run it in a separate environment with the tool installed: datumaro, fiftyone, label-studio-sdk (`label_studio`; the
labeling interface must be next to the tasks) or pyarrow (`table`, for CSV, Parquet and JSON lines). The script does
not import this library.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from pathlib import Path

Labels = dict[str, set[str]]


def datumaro(file: Path, images: Path) -> Labels:
    """Reads CVAT's XML with Datumaro, which expects the images in a folder ``images`` next to the XML file."""
    from datumaro.components.dataset import Dataset

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").symlink_to(images.resolve())
        (Path(folder) / "default.xml").write_bytes(file.read_bytes())
        dataset = Dataset.import_from(folder, "cvat")
        names = [label.name for label in dataset.categories()[next(iter(dataset.categories()))]]
        sizes = [item.media.size for item in dataset]
        assert None not in sizes, "an image has no size"
        return {
            os.path.relpath(item.media.path, Path(folder) / "images"): {names[a.label] for a in item.annotations}
            for item in dataset
        }


def fiftyone(file: Path, images: Path) -> Labels:
    """Reads a FiftyOneImageClassificationDataset with FiftyOne's importer, without the database."""
    os.environ["FIFTYONE_DATABASE_URI"] = "mongodb://none"
    from fiftyone.utils.data.importers import FiftyOneImageClassificationDatasetImporter

    importer = FiftyOneImageClassificationDatasetImporter(data_path=str(images), labels_path=str(file))
    with importer:
        return {
            os.path.relpath(path, images): {found.label for found in labels.classifications}
            for path, _, labels in importer
            if labels is not None
        }


def table(file: Path, images: Path) -> Labels:
    """Reads CSV, Parquet and JSON lines with pyarrow."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    read = {
        ".csv": pyarrow.csv.read_csv,
        ".parquet": pyarrow.parquet.read_table,
        ".jsonl": pyarrow.json.read_json,
    }
    return {row["image"]: _names(row["labels"]) for row in read[file.suffix](str(file)).to_pylist()}


def label_studio(file: Path, images: Path) -> Labels:
    """Reads Label Studio tasks and checks them with the validation of the SDK, which the server also uses."""
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface(file.with_suffix(".xml").read_text(encoding="utf-8"))
    labels = {}
    for task in json.loads(file.read_text(encoding="utf-8")):
        (prediction,) = task.pop("predictions")
        assert interface.validate_task(task), task
        assert not (errors := interface.validate_prediction(prediction, return_errors=True)), errors
        chosen = [name for result in prediction["result"] for name in result["value"]["choices"]]
        labels[task["data"]["path"]] = set(chosen)
    return labels


def _names(cell: str) -> set[str]:
    return set(cell.split(";")) - {"none", ""}


def main() -> None:
    """Compares the labels, prints the differences, and exits with status 1 if there are any."""
    tool, file, images, run = sys.argv[1], *map(Path, sys.argv[2:])
    found = {"datumaro": datumaro, "fiftyone": fiftyone, "table": table, "label_studio": label_studio}[tool](
        file, images
    )
    with run.open(encoding="utf-8", newline="") as rows:
        expected = {row["image"]: _names(row["labels"]) for row in csv.DictReader(rows)}
    differing = [image for image in expected.keys() | found.keys() if expected.get(image) != found.get(image)]
    labels = sum(map(len, expected.values()))
    print(f"{tool}: {len(found)} of {len(expected)} images, {labels} labels; {len(differing)} differ: {differing[:5]}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
