"""Unreadable images are found before the first step, or skipped and listed."""

from __future__ import annotations

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.data import image_check, images
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.image_check import unreadable
from cbsa_lightning.errors import DataError
from cbsa_lightning.method.labelers import LabeledOnly
from tiny_data import CLASSES, Squares, tiny_data, tiny_fit

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


def table_of(folder, names):
    labels = np.zeros((len(names), len(CLASSES)), np.int8)
    return AnnotationTable(folder, np.array(names, dtype=np.dtypes.StringDType()), labels, CLASSES)


@pytest.mark.parametrize("kind", SUFFIXES)
def test_truncated_images_are_found_and_intact_ones_are_not(tmp_path, kind, monkeypatch):
    names = [f"{what}.{SUFFIXES[kind]}" for what in ("whole", "half", "almost", "empty", "text", "padded")]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / names[0], kind)
    content = (tmp_path / names[0]).read_bytes()
    contents = (content, content[: len(content) // 2], content[: len(content) - 40], b"", b"404 Not Found", content)
    for name, damaged in zip(names, contents, strict=True):
        (tmp_path / name).write_bytes(damaged + (bytes(100) if name.startswith("padded") else b""))
    decoded = []
    decode = images.decode
    monkeypatch.setattr(image_check, "decode", lambda file: decoded.append(file.stem) or decode(file))
    found = unreadable(table_of(tmp_path, names), np.arange(6)).tolist()
    for row, name in enumerate(names):  # decode is the ground truth
        try:
            decode(tmp_path / name)
            assert row not in found, name
        except DataError:
            assert row in found, name
    assert {1, 3, 4} <= set(found)
    assert ("whole" in decoded) == (kind in ("BMP", "TIFF", "PPM"))


def broken(folder, *files):
    """Returns the squares with some truncated files."""
    source = Squares(folder)
    for file in files:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
    return source


def split_of(source):
    data = tiny_data(source)
    data.setup("validate")
    return data.split


def test_a_fit_stops_before_its_first_step(tmp_path, clip_folder):
    source = broken(tmp_path / "images", "train/3.png", "train/4.png", "test/0.png")
    with pytest.raises(
        DataError, match=r"^3 images cannot be read: .*\. Download .*--data.on_error skip\.$"
    ) as refused:
        tiny_fit(tmp_path, clip_folder, source)
    assert all(f"{file}.png" in str(refused.value) for file in ("train/3", "train/4", "test/0"))


def test_a_fit_ignores_broken_images_that_it_does_not_read(tmp_path, clip_folder):
    unlabeled = split_of(Squares(tmp_path / "images")).unlabeled[0]
    source = broken(tmp_path / "images", f"train/{unlabeled}.png")
    _, trainer = tiny_fit(tmp_path, clip_folder, source, labeler=LabeledOnly())
    assert trainer.global_step


@pytest.mark.parametrize("cached", [False, True])
def test_images_are_skipped_on_request_and_listed(tmp_path, clip_folder, cached):
    split = split_of(Squares(tmp_path / "images"))
    rows = (split.labeled[0], split.unlabeled[0])
    source = broken(tmp_path / "images", *(f"train/{row}.png" for row in rows), "test/0.png")
    settings = {"on_error": "skip", "image_cache": ImageCache(str(tmp_path / "cache")) if cached else None}
    report = {"logger": CSVLogger(tmp_path, name="run", version=0), "callbacks": [RunReport(num_images=2)]}
    with pytest.warns(UserWarning, match="3 images cannot be read and are skipped: "):
        _, trainer = tiny_fit(tmp_path, clip_folder, source, data=settings, trainer=report)
    data = trainer.datamodule
    assert data.left_out == [str(tmp_path / "images" / f"train/{row}.png") for row in sorted(rows)] + [
        str(tmp_path / "images/test/0.png")
    ]
    assert (tmp_path / "run/version_0/left_out.txt").read_text().splitlines() == data.left_out
    assert data.split.labeled.tolist() == split.labeled[1:].tolist()
    assert data.split.unlabeled.tolist() == split.unlabeled[1:].tolist()
    assert len(data.eval_table()) == 6
    assert np.isfinite(float(trainer.callback_metrics["val/mAP"]))
