"""Writes tiny data sets in the real layouts, with the official class names; images are flat colors."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cbsa_lightning.data.readers.coco import COCO_CLASSES
from cbsa_lightning.data.readers.nuswide import NUSWIDE_CLASSES
from cbsa_lightning.data.readers.voc import VOC_CLASSES

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def write_shards(
    folder: Path,
    stem: str,
    images: Sequence[bytes | None],
    labels: Sequence[object],
    names: Sequence[str | None],
    per_shard: int = 4,
    form: str = "stream",
) -> None:
    """Writes ``<stem>-<number>.arrow`` with an image and labels per row, in the stream or the file format of Arrow."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": content, "path": name} for content, name in zip(images, names, strict=True)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(rows, kind), "labels": pa.array(labels)})
    for number, start in enumerate(range(0, len(table), per_shard)):
        write_arrow(folder / f"{stem}-{number}.arrow", table.slice(start, per_shard), form)


def write_arrow(file: Path, table: pa.Table, form: str = "stream", compression: str | None = None) -> None:
    """Writes an Arrow file with at most three rows per record batch."""
    writer = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[form]
    with writer(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as out:
        out.write_table(table, max_chunksize=3)


def draw_labels(num_images: int, num_classes: int, seed: int, per_image: int = 2) -> np.ndarray:
    """Draws (n, C) int8 of 0 and 1: every image has a class, and every class an image if there are enough."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((num_images, num_classes), dtype=np.int8)
    for i in range(num_images):
        labels[i, i % num_classes] = 1
        labels[i, rng.choice(num_classes, per_image - 1, replace=False)] = 1
    return labels


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> None:
    """Writes a small image, width x height, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(path)


def make_voc(
    root: str | Path,
    n_train: int = 24,
    n_test: int = 12,
    year: str = "2012",
    seed: int = 0,
    difficult: Sequence[tuple[int, str]] = (),
    empty: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Writes VOCdevkit under ``root``, with lines in reverse order.

    Args:
        difficult: (training image, class) pairs that get flag 0.
        empty: Number of additional training images with no flag 1.

    Returns:
        The (n, 20) flags of the training and test images, by sorted name, without the empty ones.
    """
    folder = Path(root) / "VOCdevkit" / f"VOC{year}"
    parts = ("train", "val") if year == "2012" else ("trainval", "test")
    result = []
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for part, count, offset in ((parts[0], n_train, 0), (parts[1], n_test, 500)):
        flags = np.where(draw_labels(count, 20, seed + offset) == 1, 1, -1)
        if part == parts[0]:
            for i, name in difficult:
                flags[i, VOC_CLASSES.index(name)] = 0
        names = [f"2008_{offset + i:06d}" for i in range(count)]
        rows = list(zip(names, flags.tolist(), strict=True))
        if part == parts[0]:
            rows += [(f"2009_{i:06d}", [-1] * 20) for i in range(empty)]
        for k, name in enumerate(VOC_CLASSES):
            lines = [f"{image} {row[k]:2d}\n" for image, row in reversed(rows)]
            (folder / "ImageSets" / "Main" / f"{name}_{part}.txt").write_text("".join(lines))
        for i, (image, _) in enumerate(rows):
            write_image(folder / "JPEGImages" / f"{image}.jpg", offset + i)
        result.append(flags)
    return result[0], result[1]


def make_coco(
    root: str | Path,
    n_train: int = 90,
    n_test: int = 20,
    year: str = "2014",
    seed: int = 0,
    unannotated: int = 2,
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Writes annotations and images under ``root``, with ids of several lengths, so that their string order differs.

    Returns:
        For train and val: file name -> its class names, for the annotated images in string order of ids.
    """
    root, result = Path(root), []
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, count, start in (("train", n_train, 5), ("val", n_test, 100_005)):
        labels = draw_labels(count, 80, seed)
        ids = [start + 7 * i for i in range(count + unannotated)]
        images = [{"id": i, "file_name": f"COCO_{part}{year}_{i:012d}.jpg", "width": 40} for i in ids]
        annotations = [
            {
                "id": 100 * i + k,
                "image_id": ids[i],
                "category_id": COCO_IDS[k],
                "iscrowd": int(i == 0),
                "bbox": [0, 0, 4, 4],
                "segmentation": [[0, 0, 4, 0, 4, 4]],
            }
            for i, k in np.argwhere(labels).tolist()
        ]
        categories = [
            {"id": number, "name": name, "supercategory": "thing"}
            for number, name in zip(COCO_IDS, COCO_CLASSES, strict=True)
        ]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories[::-1]}
        (root / "annotations" / f"instances_{part}{year}.json").write_text(json.dumps(content))
        for image in images:
            write_image(root / f"{part}{year}" / str(image["file_name"]), int(str(image["id"])))
        order = sorted(range(count), key=lambda i: str(ids[i]))
        result.append(
            {str(images[i]["file_name"]): [COCO_CLASSES[k] for k in np.flatnonzero(labels[i])] for i in order}
        )
    return result[0], result[1]


def _nuswide_images(root: Path, part: str, count: int) -> list[str]:
    names = [f"tag{i % 3}/{i:04d}_{part.lower()}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        write_image(root / "Flickr" / name, i)
    return names


def _nuswide_labels(count: int, seed: int, unlabeled: int) -> np.ndarray:
    labels = draw_labels(count, 81, seed)
    labels[count - unlabeled :] = 0
    return labels


def make_nuswide_official(
    root: str | Path, n_train: int = 90, n_test: int = 20, seed: int = 0, unlabeled: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Writes ImageList, TrainTestLabels and Flickr under ``root``; the last images of each part show no class."""
    root, result = Path(root), []
    (root / "ImageList").mkdir(parents=True, exist_ok=True)
    (root / "TrainTestLabels").mkdir(exist_ok=True)
    for part, count in (("Train", n_train), ("Test", n_test)):
        labels = _nuswide_labels(count, seed, unlabeled)
        names = _nuswide_images(root, part, count)
        lines = "".join(name.replace("/", "\\") + " \r\n" for name in names)
        (root / "ImageList" / f"{part}Imagelist.txt").write_bytes(lines.encode())
        for k, concept in enumerate(NUSWIDE_CLASSES):
            column = "".join(f"{value}\n" for value in labels[:, k])
            (root / "TrainTestLabels" / f"Labels_{concept}_{part}.txt").write_text(column)
        result.append(labels)
    return result[0], result[1]


def make_nuswide_list(
    root: str | Path,
    n_train: int = 90,
    n_test: int = 20,
    seed: int = 0,
    unlabeled: int = 3,
    text: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Writes ``formatted_{train,val}_{images,labels}.npy`` (or .txt and .csv) and Flickr under ``root``."""
    root, result = Path(root), []
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", n_train), ("val", n_test)):
        labels = _nuswide_labels(count, seed, unlabeled)
        names = _nuswide_images(root, part, count)
        if text:
            (root / f"formatted_{part}_images.txt").write_text("\n".join(names) + "\n")
            np.savetxt(root / f"formatted_{part}_labels.csv", labels, fmt="%d", delimiter=",")
        else:
            np.save(root / f"formatted_{part}_images.npy", np.array(names))
            np.save(root / f"formatted_{part}_labels.npy", labels.astype(np.float64))
        result.append(labels)
    return result[0], result[1]


def write_rows(path: str | Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Writes a CSV or Parquet file, depending on the suffix of ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = list(zip(*rows, strict=True))
        pq.write_table(pa.table([pa.array(list(c)) for c in columns], names=list(header)), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *rows])
    return path


def make_label_studio(root: str | Path, n: int = 24, unlabeled: int = 12, seed: int = 0) -> np.ndarray:
    """Writes Label Studio's ``export.json`` and ``label_config.xml`` with ``n`` images under ``root/photos``.

    Returns:
        The (n, 3) labels of cat, dog and zebra: 0 for the first image, which shows none of them; -1 for the
        last ``unlabeled`` tasks, every second of which is skipped.
    """
    root, names = Path(root), ("cat", "dog", "zebra")
    labels = draw_labels(n, len(names), seed)
    labels[0], labels[n - unlabeled :] = 0, -1
    tasks = []
    for i, row in enumerate(labels):
        write_image(root / "photos" / f"a b/{i}.jpg", i)
        chosen = [name for name, value in zip(names, row, strict=True) if value == 1]
        result = {"from_name": "labels", "to_name": "image", "type": "choices", "value": {"choices": chosen}}
        answer = {"result": [result] if chosen else [], "was_cancelled": bool(row[0] < 0)}
        data = {"image": f"/data/local-files/?d=photos/a%20b/{i}.jpg"}
        tasks.append({"id": i, "data": data, "annotations": [] if row[0] < 0 and i % 2 else [answer]})
    (root / "export.json").write_text(json.dumps(tasks))
    choices = "".join(f'<Choice value="{name}"/>' for name in names)
    (root / "label_config.xml").write_text(
        f'<View><Image name="image" value="$image"/><Choices name="labels" toName="image">{choices}</Choices></View>'
    )
    return labels


def make_cvat(root: str | Path, n: int = 24, unlabeled: int = 12, seed: int = 0) -> np.ndarray:
    """Writes ``annotations.xml`` of a CVAT task with ``n`` images under ``root/images``; the last ones have no tag.

    Returns:
        The (n, 3) labels of cat, dog and zebra; -1 for the last ``unlabeled`` images.
    """
    root, names = Path(root), ("cat", "dog", "zebra")
    labels = draw_labels(n, len(names), seed)
    labels[n - unlabeled :] = -1
    images = ""
    for i, row in enumerate(labels):
        write_image(root / "images" / f"{i}.jpg", i)
        tags = (f'<tag label="{name}"/>' for name, value in zip(names, row, strict=True) if value == 1)
        images += f'<image id="{i}" name="{i}.jpg">{"".join(tags)}</image>'
    listed = "".join(f"<label><name>{name}</name><type>tag</type></label>" for name in names)
    meta = f"<meta><task><labels>{listed}</labels></task></meta>"
    (root / "annotations.xml").write_text(f"<annotations><version>1.1</version>{meta}{images}</annotations>")
    return labels


def make_table(
    root: str | Path,
    n_train: int = 12,
    n_test: int = 6,
    class_names: Sequence[str] = ("cat", "dog", "zebra"),
    form: str = "names",
    suffix: str = ".csv",
    unlabeled: int = 0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Writes ``train`` and ``test`` tables with their images under ``root/images``.

    Args:
        form: "names" (a column labels) or "columns" (one per class).
        suffix: ".csv" or ".parquet".
        unlabeled: Number of training rows, the last ones, without labels.

    Returns:
        The (n, C) label matrices of train and test; -1 for unlabeled rows.
    """
    root, result = Path(root), []
    for part, count in (("train", n_train), ("test", n_test)):
        labels = draw_labels(count, len(class_names), seed)
        if part == "train" and unlabeled:
            labels[count - unlabeled :] = -1
        rows: list[list[object]] = []
        for i, row in enumerate(labels):
            path = f"images/{part}_{i}.{'png' if i % 2 else 'jpg'}"
            write_image(root / path, i)
            names = ";".join(name for name, value in zip(class_names, row, strict=True) if value == 1)
            cells = [names] if form == "names" else [int(value) if value >= 0 else None for value in row]
            rows.append([path, *cells])
        header = ["image", "labels"] if form == "names" else ["image", *class_names]
        write_rows(root / f"{part}{suffix}", header, rows)
        result.append(labels)
    return result[0], result[1]
