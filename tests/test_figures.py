"""`cbsa figure`: every figure of a short run, and errors that name the remedy."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from cbsa_lightning.__main__ import main
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.method.contexts import cooccurrence
from cbsa_lightning.reports.context_images import context_images
from cbsa_lightning.reports.localization import localization_gallery
from cbsa_lightning.reproduce.pseudo_label_curves import Point, draw_points
from layouts import make_table, write_rows
from test_pictures import assert_readable, texts

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = ("cat", "dog", "zebra")


def fit(folder, clip, name, *settings):
    main(
        [
            "fit",
            f"--config={CONFIGS / 'methods' / 'cbsa.yaml'}",
            f"--config={CONFIGS / 'data' / 'table.yaml'}",
            f"--model.init_args.clip={clip}",
            "--model.init_args.warmup_epochs=1",
            "--data.image_size=64",
            "--data.num_workers=0",
            "--data.labeled_fraction=0.5",
            f"--data.source.init_args.train={folder / 'train.csv'}",
            f"--data.source.init_args.test={folder / 'test.csv'}",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=2",
            "--trainer.enable_progress_bar=false",
            "--report.enabled=false",
            "--trainer.logger.class_path=RunLogger",
            f"--trainer.logger.init_args.save_dir={folder}",
            "--trainer.logger.init_args.name=runs",
            f"--trainer.logger.init_args.version={name}",
            *settings,
        ]
    )
    return folder / "runs" / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    make_table(folder, n_train=16)
    return folder


@pytest.fixture(scope="module")
def run(folder, clip_folder):
    return fit(folder, clip_folder, "two_contexts")


@pytest.fixture(scope="module")
def warmup_run(folder, clip_folder):
    return fit(folder, clip_folder, "warm_up", "--trainer.max_epochs=1", "--model.init_args.num_contexts=0")


def draw(tmp_path, *words):
    """Draws a figure and returns the rows of its CSV file."""
    file = main(["figure", *map(str, words), "--out", str(tmp_path)])
    if file.suffix == ".png":
        assert np.ptp(imread(file)) > 0
    with file.with_suffix(".csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_figure_4_shows_the_images_with_the_highest_probability(run, tmp_path):
    rows = draw(tmp_path, 4, run, "--count", 2)
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    classifier = Classifier.load(run / "checkpoints" / "last.ckpt")
    files = sorted((run.parents[1] / "images").glob("test_*"))
    with torch.no_grad():
        views = torch.stack([classifier.view(file) for file in files])
        logits = classifier.network(classifier.network.features(views)).context_logits
    for k in (0, 1):
        mine = [row for row in rows if row["context"] == str(k + 1)]
        best = logits.softmax(1)[:, k].topk(2)
        assert {row["image"] for row in mine} == {f"images/{files[i].name}" for i in best.indices}
        np.testing.assert_allclose([float(row["probability"]) for row in mine], best.values, atol=1e-5)
        names = [n for n, c in zip(NAMES, checkpoint["state_dict"]["context_partition"], strict=True) if c == k]
        assert {row["classes"] for row in mine} == {"; ".join(names)}


def test_figures_of_a_checkpoint_need_images(run, tmp_path):
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(ConfigError, match=r"copy\.ckpt is not in the folder of a run.*Use --images FOLDER"):
        draw(tmp_path, 4, copy)
    rows = draw(tmp_path, 4, copy, "--images", run.parents[1] / "images", "--max_images", 5, "--count", 9)
    assert len(rows) == 2 * 5


def test_figure_4_needs_contexts(warmup_run, tmp_path):
    with pytest.raises(ConfigError, match=r"last\.ckpt has no contexts.*num_contexts K"):
        draw(tmp_path, 4, warmup_run)


def test_figure_5_needs_only_annotations(folder, tmp_path):
    rows = draw(tmp_path, 5, folder / "train.csv", "--contexts", 2)
    labels, _ = make_table(tmp_path / "again", n_train=16)
    assert [row["class"] for row in rows] == list(NAMES)
    assert {row["context"] for row in rows} == {"1", "2"}
    assert [int(row["images"]) for row in rows] == labels.sum(0).tolist()
    values = [[float(row[name]) for name in NAMES] for row in rows]
    np.testing.assert_allclose(values, cooccurrence(torch.from_numpy(labels)), atol=1e-6)


def test_figure_5_accepts_a_configuration(run, tmp_path):
    assert len(draw(tmp_path, 5, run / "config.yaml", "--format", "svg")) == 3
    assert "<svg" in (tmp_path / "figure_5.svg").read_text(encoding="utf-8")


def test_figure_5_needs_the_number_of_contexts(folder, tmp_path):
    with pytest.raises(ConfigError, match="Add --contexts K; the paper uses 6 on COCO"):
        draw(tmp_path, 5, folder / "train.csv")


def test_figure_6_compares_runs(run, tmp_path):
    rows = draw(tmp_path, 6, run)
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        logged = [row for row in csv.DictReader(stream) if row["pseudo/CF1"]]
    assert [(row["system"], row["epoch"]) for row in rows] == [("two_contexts", row["epoch"]) for row in logged]
    assert float(rows[-1]["CF1"]) == pytest.approx(100 * float(logged[-1]["pseudo/CF1"]), abs=1e-3)


def test_figure_6_reads_the_cells_of_a_table(tmp_path):
    rows = [
        ["A", "voc", p, seed, epoch, p + seed + epoch, "", "", ""]
        for p in (5, 10)
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    head = ["system", "data", "p", "seed", "epoch", "CF1", "precision", "recall", "coverage"]
    write_rows(tmp_path / "table_1_pseudo_labels.csv", head, rows)
    found = draw(tmp_path, 6, tmp_path / "table_1_pseudo_labels.csv", "--by", "fraction")
    assert len(found) == 8
    points = [Point(*row[:6]) for row in rows]
    by_fraction = draw_points(points, "fraction").axes[0].containers[0].lines[0]
    assert by_fraction.get_xydata().tolist() == [[5, 7.5], [10, 12.5]]
    panels = draw_points(points).axes
    assert [panel.get_title() for panel in panels] == ["voc, p = 5", "voc, p = 10"]
    assert panels[0].containers[0].lines[0].get_xydata().tolist() == [[0, 6.5], [1, 7.5]]


def test_figure_6_does_not_magnify_small_differences():
    points = [Point("A", "", "", "", epoch, 60 + epoch / 100) for epoch in range(3)]
    low, high = draw_points(points).axes[0].get_ylim()
    assert high - low >= 10


def test_figure_6_names_the_remedy(run, warmup_run, folder, tmp_path):
    with pytest.raises(DataError, match=r"metrics\.csv has no pseudo/CF1.*data\.labeled_fraction.*warm-up"):
        draw(tmp_path, 6, run, warmup_run)
    with pytest.raises(ConfigError, match=r"is not the folder of a run.*Use the folder of a run"):
        draw(tmp_path, 6, folder)
    with pytest.raises(DataError, match=r"train\.csv does not have the columns system.*cbsa table"):
        draw(tmp_path, 6, folder / "train.csv")
    with pytest.raises(ConfigError, match="--by fraction needs the table_N_pseudo_labels"):
        draw(tmp_path, 6, run, "--by", "fraction")


def test_figure_7_shows_the_labels_with_the_highest_scores(run, tmp_path):
    rows = draw(tmp_path, 7, run, "--count", 3, "--labels", 1)
    classifier = Classifier.load(run / "checkpoints" / "last.ckpt")
    images = dict.fromkeys(row["image"] for row in rows)
    assert len(images) == 3
    scores = classifier.scores([run.parents[1] / image for image in images])
    labels = {row["image"]: row["label"] for row in rows}
    assert list(labels.values()) == [NAMES[k] for k in scores.argmax(1)]
    kinds = dict.fromkeys(row["map"] for row in rows)
    assert list(kinds) == ["Grad-CAM", "attention", "value-path similarity"]
    attention = [float(row["value"]) for row in rows if row["map"] == "attention"]
    assert sum(attention) == pytest.approx(3, abs=1e-3)


def test_unknown_figures_are_refused(capsys):
    with pytest.raises(ConfigError, match=r"no figure '3'.*figures 4, 5, 6, 7"):
        main(["figure", "3"])
    assert main(["figure"]) is None
    assert "cbsa figure N --help" in capsys.readouterr().out


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"last\.ckpt does not exist. Use the folder of a finished run"):
        draw(tmp_path, 7, tmp_path)


def test_texts_do_not_overlap():
    image = np.zeros((8, 8, 3), np.uint8)
    names = [[f"class {i} with a long name" for i in range(count)] for count in (40, 1, 3)]
    figure = context_images([[image] * 5] * 3, [[0.5] * 5] * 3, names)
    assert_readable(figure)
    assert any("more" in text.get_text() for text in texts(figure))
    maps = {kind: np.random.default_rng(0).random((10, 2, 2)) for kind in ("Grad-CAM", "value-path similarity")}
    assert_readable(localization_gallery([image] * 10, [f"{'long ' * i}name 0.50" for i in range(10)], maps))


@pytest.mark.parametrize(
    "draw_nothing", [lambda: context_images([[]], [[]], [[]]), lambda: localization_gallery([], [], {})]
)
def test_no_images(draw_nothing):
    with pytest.raises(DataError, match="no images"):
        draw_nothing()
