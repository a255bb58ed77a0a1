"""Tables of predictions, and the callback of `cbsa predict` that writes them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, features

from cbsa_lightning.callbacks.predictions import WritePredictions, gather
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.datamodule import SSMLLDataModule
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.data.readers.unlabeled import read_images
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.errors import ConfigError, DataError, OutputError
from cbsa_lightning.inference import predictions
from cbsa_lightning.inference.predictions import check_output, in_table_order, write_predictions, write_thresholds
from cbsa_lightning.training.cbsa import CBSAModule
from tiny_clip import tiny_clip

NAMES = ("cat", "dog, brown", 'a "quoted" one')
PATHS = ["b/2.png", "a,1.png", "ü.png", "c.png"]
SCORES = np.random.default_rng(0).random((4, 3)).astype(np.float32)
LABELS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)


def table(root: Path) -> AnnotationTable:
    return AnnotationTable(root, np.array(PATHS, np.dtypes.StringDType()), np.full((4, 3), -1, np.int8), NAMES)


def test_csv_reads_back(tmp_path):
    file = tmp_path / "new" / "out.csv"
    write_predictions(file, table(tmp_path), NAMES, SCORES, LABELS)
    with file.open(newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    assert header == ["image", "labels", *NAMES]
    assert [row[0] for row in rows] == PATHS
    assert [row[1] for row in rows] == ['cat;a "quoted" one', "none", ";".join(NAMES), "dog, brown"]
    assert np.array_equal(np.array([row[2:] for row in rows], dtype=np.float32), SCORES)
    assert list(file.parent.iterdir()) == [file]


def test_parquet_reads_back_and_replaces(tmp_path):
    file = tmp_path / "out.parquet"
    file.write_text("old")
    write_predictions(file, table(tmp_path), NAMES, SCORES, LABELS)
    content = pyarrow.parquet.read_table(file).to_pydict()
    assert list(content) == ["image", "labels", *NAMES]
    assert content["image"] == PATHS
    assert np.array_equal(np.array([content[name] for name in NAMES], np.float32).T, SCORES)


def test_failed_writes_leave_no_files(tmp_path):
    file = tmp_path / "out.csv"
    file.write_text("old")
    holes = SCORES.copy()
    holes[2, 1] = np.nan
    with pytest.raises(DataError, match=r"1 of 4 images have no finite score: ü.png \(row 2\)"):
        write_predictions(file, table(tmp_path), NAMES, holes, LABELS)
    with pytest.raises(DataError, match=r"\(4, 3\)"):
        write_predictions(file, table(tmp_path), NAMES, SCORES[:3], LABELS[:3])
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("name", "classes", "message"), [
    ("out.txt", NAMES, r"\.csv or \.parquet"),
    ("out", NAMES, r"\.csv or \.parquet"),
    ("out.csv", ("labels", "dog", "cat"), "'labels'"),
    ("out.csv", ("a;b", "dog", "cat"), "'a;b'"),
])  # fmt: skip
def test_unwritable_values_are_refused(tmp_path, name, classes, message):
    with pytest.raises(ConfigError, match=message):
        write_predictions(tmp_path / name, table(tmp_path), classes, SCORES, LABELS)


def test_invalid_output_paths_are_refused_before_prediction(tmp_path, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    for place, message in (
        ("folder.csv", "is a folder"),
        ("file/out.csv", "below .*file, which is not a writable folder"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check_output(tmp_path / place, NAMES)
        assert str(tmp_path / place) in str(error.value)
    check_output(tmp_path / "new" / "and" / "deeper" / "out.csv", NAMES)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="not a writable folder"):
        check_output(tmp_path / "out.csv", NAMES)


def test_errors_name_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(predictions.WRITERS, ".csv", full)
    with pytest.raises(OutputError, match=r"out\.csv: cannot be written \(No space left"):
        write_predictions(tmp_path / "out.csv", table(tmp_path), NAMES, SCORES, LABELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_unusual_names_read_back(tmp_path, name):
    """Names of classes and files may contain quotes, line breaks, control characters and emoji."""
    classes = ("a\nb", 'say "x"', "c,d", "\x01", "🏳️‍🌈", "=1+1", "'", "z\u2028b")
    paths = ["a\nb.jpg", '"c".jpg', "\t.jpg", "é.jpg"]
    odd = AnnotationTable(tmp_path, np.array(paths, np.dtypes.StringDType()), np.full((4, 8), -1, np.int8), classes)
    write_predictions(tmp_path / name, odd, classes, np.full((4, 8), 0.5, np.float32), np.ones((4, 8), bool))
    if name == "out.csv":
        with (tmp_path / name).open(newline="", encoding="utf-8") as lines:
            header, *rows = csv.reader(lines)
    else:
        content = pyarrow.parquet.read_table(tmp_path / name).to_pydict()
        header, rows = list(content), list(zip(*content.values(), strict=True))
    assert header == ["image", "labels", *classes]
    assert [row[0] for row in rows] == paths
    assert {row[1] for row in rows} == {";".join(classes)}


def test_rows_can_be_in_any_order():
    parts = [(np.array(rows), SCORES[rows], LABELS[rows]) for rows in ([3, 0], [2], [1, 3])]
    scores, labels = in_table_order(4, 3, parts)
    assert np.array_equal(scores, SCORES)
    assert np.array_equal(labels, LABELS)
    with pytest.raises(DataError, match="1 of 4 images have no prediction: rows 2"):
        in_table_order(4, 3, [parts[0], parts[2]])


def test_predict_writes_the_folder_in_order(tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b", "a", "d", "c", "e"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    data = SSMLLDataModule(
        Digits(str(tmp_path), 1, 1), image_size=64, eval_batch_size=2, num_workers=0, predict=str(folder)
    )
    module = CBSAModule(
        data.class_names, clip=str(tiny_clip(tmp_path / "clip")), num_contexts=2, prompt_length=2, decoder_feedforward=8
    )
    module.cut.fill_(0.55)
    file = tmp_path / "out.parquet"
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[WritePredictions(str(file))], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.predict(module, datamodule=data)
    content = pyarrow.parquet.read_table(file).to_pydict()
    found = data.predict_table()
    assert content["image"] == found.paths.tolist()
    assert len(content["image"]) == 5
    module.eval()
    expected = module(torch.stack([PlainView(64)(decode(found.file(i))) for i in range(5)]))
    written = np.array([content[name] for name in data.class_names]).T
    np.testing.assert_allclose(written, expected.numpy(), atol=1e-6)
    for text, row in zip(content["labels"], written, strict=True):
        assert text == ";".join(name for name, score in zip(data.class_names, row, strict=True) if score >= 0.55)
    assert str(file) in capsys.readouterr().out

    trainer.callbacks = [WritePredictions("out.txt")]
    with pytest.raises(ConfigError, match=r"out\.txt"):
        trainer.predict(module, datamodule=data)


def photos(folder: Path, *names: str) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    return folder


def damaged(folder: Path, *names: str) -> Path:
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    return folder


def predict(tmp_path: Path, clip: Path, folder: Path, on_error: str = "stop") -> WritePredictions:
    """Predicts a folder into ``out.csv`` with two images per batch; returns the callback."""
    data = SSMLLDataModule(
        Digits(str(tmp_path), 1, 1), image_size=64, eval_batch_size=2, num_workers=0, predict=str(folder)
    )
    torch.manual_seed(0)
    module = CBSAModule(data.class_names, clip=str(clip), num_contexts=2, prompt_length=2, decoder_feedforward=8)
    callback = WritePredictions(str(tmp_path / "out.csv"), on_error)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.predict(module, datamodule=data)
    return callback


def column(file: Path, name: str) -> list[str]:
    with file.open(newline="", encoding="utf-8") as lines:
        return [row[name] for row in csv.DictReader(lines)]


def test_skipped_files_are_counted_and_listed(tmp_path, clip_folder, capsys):
    folder = photos(tmp_path / "photos", "a.png", "b.JPG")
    Image.new("RGB", (9, 9)).save(folder / "c.mpo", "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    (folder / "deep").mkdir()
    others = ["d.HEIC", "deep/e.heic", "deep/f.dcm", "deep/g.mp4", "deep/h"]
    for name in others:
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    predict(tmp_path, clip_folder, folder)
    assert column(tmp_path / "out.csv", "image") == ["a.png", "b.JPG", "c.mpo"]
    assert column(tmp_path / "out_left_out.csv", "image") == others
    said = capsys.readouterr().out
    assert "5 files were skipped (2 .heic, 1 .dcm, 1 .mp4, 1 without a suffix)" in said
    assert str(tmp_path / "out_left_out.csv") in said


@pytest.mark.skipif(not features.check("avif"), reason="this version of Pillow cannot decode AVIF")
def test_avif_is_predicted(tmp_path, clip_folder):
    predict(tmp_path, clip_folder, photos(tmp_path / "photos", "a.avif"))
    assert column(tmp_path / "out.csv", "image") == ["a.avif"]
    assert not (tmp_path / "out_left_out.csv").exists()


def test_damaged_images_are_skipped_on_request(tmp_path, clip_folder, capsys):
    whole, broken = ["b.png", "d.jpg"], ["a.jpg", "c.png", "e.png"]
    folder = damaged(photos(tmp_path / "photos", *whole, *broken), *broken)
    predict(tmp_path, clip_folder, photos(tmp_path / "whole", *whole))
    expected = (tmp_path / "out.csv").read_text()
    (tmp_path / "out.csv").unlink()
    found = predict(tmp_path, clip_folder, folder, "skip")
    assert (tmp_path / "out.csv").read_text() == expected
    assert sorted(found.unread) == [0, 2, 4]
    assert column(tmp_path / "out_left_out.csv", "image") == broken
    assert all(str(folder) in reason for reason in column(tmp_path / "out_left_out.csv", "reason"))
    assert "3 files were skipped (3 unreadable)" in capsys.readouterr().out


def test_earlier_predictions_are_kept_if_an_image_is_damaged(tmp_path, clip_folder):
    folder = damaged(photos(tmp_path / "photos", "a.png", "b.png", "c.png", "d.png", "e.png", "f.png"), "d.png")
    with pytest.raises(DataError, match=r"d\.png: .*out\.csv contains .* 3 images .* --predictions\.on_error skip"):
        predict(tmp_path, clip_folder, folder)
    assert column(tmp_path / "out.csv", "image") == ["a.png", "b.png", "c.png"]


def test_a_damaged_image_without_an_output_file_is_an_error(tmp_path):
    folder = damaged(photos(tmp_path / "photos", "a.png"), "a.png")
    data = SSMLLDataModule(Digits(str(tmp_path)), image_size=64, num_workers=0, predict=str(folder))
    with pytest.raises(DataError, match=r"a\.png"):
        next(iter(data.predict_dataloader()))


def test_invalid_on_error_is_refused():
    with pytest.raises(ConfigError, match=r"predictions\.on_error must be 'stop' or 'skip', got 'ignore'"):
        WritePredictions(on_error="ignore")


@pytest.mark.parametrize(("name", "content", "kind"), [
    ("a.heic", b"", "HEIC"), ("b.jpg", b"\0\0\0\x18ftypheic", "HEIC"), ("c.dcm", b"", "DICOM"),
    ("d.jpg", bytes(128) + b"DICM", "DICOM"), ("e.NEF", b"", "camera raw"), ("f.mp4", b"", "video"),
])  # fmt: skip
def test_the_error_for_a_file_of_another_kind_has_a_remedy(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content + bytes(200))
    data = SSMLLDataModule(Digits(str(tmp_path)), image_size=64, num_workers=0, predict=str(tmp_path / name))
    with pytest.raises(DataError, match=f"{name}: {kind} files are not supported; convert the file to JPEG or PNG"):
        next(iter(data.predict_dataloader()))


def test_the_error_for_a_folder_without_images_lists_its_files(tmp_path):
    folder = photos(tmp_path / "photos")
    with pytest.raises(DataError, match="no image in this folder or its subfolders, it is empty"):
        read_images(folder, NAMES)
    (folder / "a.heic").touch()
    with pytest.raises(DataError, match=r"contains only 1 \.heic"):
        read_images(folder, NAMES)


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = np.arange(rank, 5, 2)  # three rows in one process, two in the other
    parts = gather([(rows[i : i + 1], rows[i : i + 1, None] / 8, rows[i : i + 1, None] > 2) for i in range(len(rows))])
    scores, labels = in_table_order(5, 1, parts)
    assert scores[:, 0].tolist() == [0, 0.125, 0.25, 0.375, 0.5]
    assert labels[:, 0].tolist() == [False, False, False, True, True]
    Path(folder, f"done{rank}").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_uneven_shards(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()


def test_thresholds_have_one_row_per_class_and_empty_unknown_values(tmp_path):
    expected = np.array([[0.9, 0.8, 1.0, 0.5, 0.4, 0.6], [np.nan] * 3 + [0.0] * 3])
    measured = {"precision": np.array([0.75, 0]), "recall": np.array([1.0, 0]), "positives": np.array([3, 0])}
    file = tmp_path / "thresholds.csv"
    write_thresholds(file, ["a,b", "c"], ["a, b", "c"], np.array([0.25, np.inf]), np.array([5, 0]), expected, measured)
    with file.open(newline="") as lines:
        first, second = csv.DictReader(lines)
    assert (first["class"], first["prompt"], first["labeled_positives"]) == ("a,b", "a, b", "5")
    assert (float(first["threshold"]), float(second["threshold"])) == (0.25, np.inf)
    assert [float(first[f"expected_recall{end}"]) for end in ("", "_low", "_high")] == [0.5, 0.4, 0.6]
    assert second["expected_precision"] == ""
    assert (first["validation_precision"], first["validation_positives"]) == ("0.75", "3")


def test_thresholds_without_probabilities_and_validation_omit_these_columns(tmp_path):
    file = tmp_path / "thresholds.csv"
    write_thresholds(file, ["a"], ["a"], np.array([0.5]), np.array([2]), None, {})
    with file.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert row["expected_precision"] == ""
    assert not any(name.startswith("validation") for name in row)
