"""The report page of a run: its content, omitted sections, and its size."""

from __future__ import annotations

import base64
import re
import time
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pyarrow.csv
import pytest
from lightning.pytorch.callbacks import Callback
from PIL import Image

from cbsa_lightning.callbacks.baselines import MeasureBaselines
from cbsa_lightning.callbacks.labels import WriteLabels
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.callbacks.report_page import WriteReportPage
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.inference.labels.image_labels import ImageLabels, write_labels
from cbsa_lightning.inference.labels.review import next_to_label, suspicious_labels, write_list
from cbsa_lightning.inference.predictions import write_predictions, write_thresholds
from cbsa_lightning.io.runs import set_folder
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.reports.page.page import Run, build_page
from cbsa_lightning.reports.precision_recall import average_precisions, precision_recall_curves
from tiny_data import CLASSES, Squares, tiny_data, tiny_module, tiny_trainer

VOID = {"meta", "br", "img"}
ODD = ('<script>alert("a")</script>', "R&D 'lab'", "_$x^2$")


class Page(HTMLParser):
    """A parsed page: headings, rows of the class table and image sources; checks that all elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.cells, self.sources, self.tags, self.texts = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1][-1] += data
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


def made(folder, images=30, names=(*ODD, "cat", "dog"), unlabeled=40, validation=True, doubts=True, present=10):
    """Writes a run with random scores, in which only the first ``present`` rows have image files."""
    rng = np.random.default_rng(0)
    root, C = folder / "photos", len(names)
    root.mkdir(parents=True)
    paths = np.array([f"<b>{i}&.png" for i in range(images)], dtype=np.dtypes.StringDType())
    for i in range(min(present, images)):
        Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(root / str(paths[i]))
    truth = (rng.random((images, C)) < 0.3).astype(np.int8)
    truth[:3] = 1
    table = AnnotationTable(root, paths, truth, names)
    scores = np.clip(0.4 * truth + 0.6 * rng.random((images, C)), 0, 1).astype(np.float32)
    thresholds = np.full(C, 0.5, np.float32)
    thresholds[-1] = np.inf
    run = folder / "version_0"
    write_thresholds(run / "thresholds.csv", names, names, thresholds, np.arange(C), None, {})
    if validation:
        write_predictions(run / "predictions.csv", table, names, scores, scores >= thresholds)
    if unlabeled:
        chosen = np.array([str(paths[i % images]) for i in range(unlabeled)])
        labels = ImageLabels.decided(chosen, names, rng.random((unlabeled, C), dtype=np.float32), thresholds)
        write_labels(run / "labels.csv", labels)
        write_list(run / "next_to_label.csv", next_to_label(labels, 200))
    if doubts:
        write_list(run / "suspicious_labels.csv", suspicious_labels(paths, names, truth, rng.random((images, C))))
    return Run(run, tuple(names), root, {"validation images": images}, table if validation else None), table, scores


def test_the_page_is_valid_html_without_external_resources(tmp_path):
    page = Page(build_page(made(tmp_path)[0]))
    assert page.headings == [
        *("Classes", "Images by class", "What to label next", "Suspicious labels"),
        "Training, settings and versions",
    ]
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "link" not in page.tags


def test_names_of_classes_and_files_are_escaped(tmp_path):
    text = build_page(made(tmp_path)[0])
    assert "<script>alert" not in text
    assert "<b>" not in text
    page = Page(text)
    assert [row[0] for row in page.cells[1:]] == [*ODD, "cat", "dog"]
    assert "<b>3&.png" in page.text
    assert page.tags.count("script") == 1


def test_the_table_contains_the_metrics_of_the_predictions(tmp_path):
    run, table, scores = made(tmp_path)
    page = Page(build_page(run))
    AP = average_precisions(scores, table.labels)
    labels = pyarrow.csv.read_csv(run.folder / "labels.csv")["labels"].to_pylist()
    for k, row in enumerate(page.cells[1:]):
        given, truth = scores[:, k] >= 0.5, table.labels[:, k] == 1
        if k == len(AP) - 1:  # the threshold of the last class is infinite
            assert row[4:6] == ["never", "–"]
            continue
        precision, recall = (given & truth).sum() / given.sum(), (given & truth).sum() / truth.sum()
        figures = [AP[k], 0.5, precision, recall, 2 * precision * recall / (precision + recall)]
        expected = [str(k), str(truth.sum()), *(f"{100 * value:.1f} %" for value in figures)]
        assert row[1:-1] == expected
        assert int(row[-1]) == sum(run.class_names[k] in cell.split(";") for cell in labels)
    assert f"mean average precision (mAP) of {100 * AP.mean():.0f} %" in page.text


def test_unreadable_images_are_replaced_by_a_placeholder(tmp_path):
    run = made(tmp_path)[0]
    broken = run.root / "<b>0&.png"
    broken.write_bytes(broken.read_bytes()[:100])
    page = Page(build_page(run))
    assert page.text.count("cannot be read") > 0
    uris = [source for source in page.sources if source.startswith("data:image/jpeg")]
    for uri in uris:
        with Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            assert image.size == (120, 68)


@pytest.mark.parametrize(
    ("missing", "headings"),
    [
        ({"validation": False}, {"Classes", "Images by class", "What to label next", "Suspicious labels"}),
        ({"unlabeled": 0}, {"Classes", "Images by class", "Suspicious labels"}),
        ({"doubts": False}, {"Classes", "Images by class", "What to label next"}),
        ({"validation": False, "unlabeled": 0, "doubts": False}, {"Classes"}),
    ],
)
def test_sections_without_data_are_omitted(tmp_path, missing, headings):
    page = Page(build_page(made(tmp_path, **missing)[0]))
    assert set(page.headings) == headings | {"Training, settings and versions"}
    if "validation" in missing:
        assert "quality of the model is unknown" in page.text
        assert "AP" not in page.cells[0]


def test_contexts_are_listed_with_their_classes(tmp_path):
    run, *_ = made(tmp_path)
    page = Page(build_page(Run(**{**vars(run), "partition": np.array([0, 0, 0, 1, 1])})))
    assert "Contexts" in page.headings
    assert "Context 2: cat, dog" in page.text


def test_weak_classes_and_next_steps_are_listed(tmp_path):
    run, *_ = made(tmp_path)
    run = Run(**{**vars(run), "baselines": {"a linear probe": 0.5}, "few_images": 50})
    text = Page(build_page(run)).text
    assert "a linear probe has 50 %." in text
    assert "With only 30 images" in text
    assert "Fewer than 10 labeled images show" in text
    assert "Next, label the 40 images in next_to_label.csv" in text
    assert re.search(r"check the \d+ existing labels in suspicious_labels.csv", text)


def test_predictions_of_other_images_are_refused(tmp_path):
    run, table, _ = made(tmp_path)
    other = AnnotationTable(run.root, table.paths[::-1], table.labels, table.class_names)
    with pytest.raises(DataError, match=r"predictions.csv does not contain the validation images"):
        build_page(Run(**{**vars(run), "validation": other}))


def test_labels_of_other_classes_are_refused(tmp_path):
    run, *_ = made(tmp_path)
    labels = run.folder / "labels.csv"
    header, cells = labels.read_text(encoding="utf-8").split("\n", 1)
    labels.write_text(f"{header}\n{cells.replace('cat', 'horse')}", encoding="utf-8")
    with pytest.raises(DataError, match=r"labels.csv contains 'horse', which is not a class"):
        build_page(run)
    labels.write_text(f"{header.replace('cat', 'horse')}\n{cells}", encoding="utf-8")
    with pytest.raises(DataError, match=r"labels.csv does not have the expected format"):
        build_page(run)


def test_the_size_of_the_page_is_bounded(tmp_path):
    run, *_ = made(tmp_path, images=500, names=[f"class {k}" for k in range(1000)], unlabeled=500, present=500)
    start = time.perf_counter()
    text = build_page(run)
    assert time.perf_counter() - start < 60
    assert len(text) < 4_000_000
    page = Page(text)
    assert len(page.cells) == 1001
    assert 30 * 10 < len(page.sources) <= 30 * 12 + 2 * 24
    assert "shows the 30 of 1,000 classes with the lowest AP" in page.text


def test_curves_show_the_mean_and_the_lowest_classes():
    rng = np.random.default_rng(1)
    truths = (rng.random((200, 9)) < 0.3).astype(np.int8)
    truths[:, 0] = 0
    truths[::5, 1] = -1
    scores = rng.random((200, 9))
    scores[:, 2] = truths[:, 2] * 0.5 + 0.25
    AP = average_precisions(scores, truths)
    assert np.isnan(AP[0])
    assert AP[2] == 1
    axes = precision_recall_curves(scores, truths, [f"_{k}" for k in range(9)]).axes[0]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [name.split(": ")[1] for name in named[:5]] == [f"_{k}" for k in np.argsort(AP)[:5]]
    assert named[5].endswith("mean of 8 classes")
    assert not precision_recall_curves(scores[:, :1], truths[:, :1], ["a"]).axes[0].get_lines()


def fit(folder, clip, source, callbacks=None, trainer=None, **settings):
    if callbacks is None:
        callbacks = [RunReport(4), WriteLabels(budget=5), WriteReportPage()]
    run = tiny_trainer(folder, max_epochs=2, callbacks=callbacks, **(trainer or {}))
    set_folder(run, folder)
    run.fit(tiny_module(clip, **settings), datamodule=tiny_data(source))
    return run


class Metrics(Callback):
    """Stores the metrics at the end of a fit."""

    def on_fit_end(self, trainer, module):
        self.found = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_page_of_a_run_contains_its_metrics(tmp_path, clip_folder, squares_folder):
    metrics = Metrics()
    callbacks = [MeasureBaselines(), metrics, RunReport(4), WriteLabels(budget=5), WriteReportPage()]
    settings = {"labeler": StackedProbes(), "stack_share": 0.5}
    run = fit(tmp_path / "run", clip_folder, Squares(squares_folder, train=40), callbacks, **settings)
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert set(page.headings) >= {"Classes", "Curves", "Images by class", "What to label next", "Suspicious labels"}
    assert "Contexts" in page.headings
    assert "cannot be read" not in page.text
    for k, row in enumerate(page.cells[1:]):
        value = metrics.found[f"val/AP/{CLASSES[k]}"]
        assert row[3] == ("–" if np.isnan(value) else f"{100 * value:.1f} %")
    assert f"{100 * metrics.found['val/mAP']:.0f} %" in page.text
    zero_shot = next(c for c in run.callbacks if isinstance(c, MeasureBaselines)).results["zero-shot"]
    assert f"CLIP without training (zero-shot) has {100 * zero_shot:.0f} %" in page.text
    assert "16 labeled images, 24 unlabeled images, 7 validation images." in page.text


def test_labeled_only_runs_without_validation_have_a_page(tmp_path, clip_folder, squares_folder):
    trainer = {"limit_val_batches": 0}
    fit(tmp_path / "run", clip_folder, Squares(squares_folder), trainer=trainer, labeler=LabeledOnly())
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "Suspicious labels" not in page.headings
    assert "Curves" not in page.headings


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize(
    "callbacks", [[RunReport(4), WriteReportPage(enabled=False)], [RunReport(enabled=False), WriteReportPage()]]
)
def test_no_page_is_written_if_it_is_disabled_or_has_no_content(tmp_path, clip_folder, squares_folder, callbacks):
    fit(tmp_path / "run", clip_folder, Squares(squares_folder), callbacks)
    assert not (tmp_path / "run" / "report.html").exists()
    with pytest.raises(ConfigError, match=r"report_page\.enabled"):
        WriteReportPage(enabled=1)
