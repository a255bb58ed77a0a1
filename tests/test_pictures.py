"""Plots of a run: correct content and no overlapping texts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from cbsa_lightning.errors import DataError
from cbsa_lightning.reports.pictures import (
    GREEN,
    GREY,
    ORANGE,
    attention_gallery,
    context_map,
    per_class_bars,
    prediction_gallery,
    read_history,
    training_curves,
)

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def names_of(count: int) -> list[str]:
    return [f"class_{i}" + "_long_name" * (i % 3) for i in range(count)]


def texts(figure: Figure) -> list[Text]:
    """Returns the visible texts; matplotlib also has ticks outside the limits, and ticks of hidden axes."""
    found = [*figure.texts, *([figure._suptitle] if figure._suptitle else [])]
    for axes in figure.axes:
        found += [axes.title, axes._left_title, *axes.texts]
        if axes.axison:
            found += [axes.xaxis.label, axes.yaxis.label]
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                ticks = axis.get_major_ticks()
                found += [tick.label1 for tick in ticks if min(limits) <= tick.get_loc() <= max(limits)]
        if axes.get_legend():
            found += axes.get_legend().get_texts()
    unique = {id(text): text for text in found if text.get_text().strip()}
    return list(unique.values())


def assert_readable(figure: Figure) -> None:
    """Asserts that no text exceeds the figure and that no two texts overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = {}
    for text in texts(figure):
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1, text
        assert box.y1 <= figure.bbox.height + 1, text
        boxes[text] = box.padded(-1)  # glyphs are usually smaller than their box
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)


@pytest.mark.parametrize("classes", [5, 20, 80])
def test_texts_do_not_overlap(classes):
    rng = np.random.default_rng(0)
    names = names_of(classes)
    truths = (rng.random((6, classes)) < 0.1).astype(np.int8)
    truths[0, :2] = -1
    scores, thresholds = rng.random((6, classes)), np.full(classes, 0.6)
    assert_readable(prediction_gallery(IMAGES, truths, scores, thresholds, names))
    maps = rng.random((6, classes, 3, 3))
    assert_readable(attention_gallery(IMAGES[:3], maps[:3], truths[:3], scores[:3], thresholds, names))
    S, partition = rng.random((classes, classes)), rng.integers(0, 3, classes)
    assert_readable(context_map(S, partition, names))
    AP = rng.random(classes)
    AP[1] = np.nan
    assert_readable(per_class_bars(AP, names))


def test_symbols_and_colors_of_labels():
    truths = np.array([[1, 0, 1, 0, -1]])
    scores = np.array([[0.9, 0.8, 0.3, 0.2, 0.7]])
    figure = prediction_gallery(IMAGES[:1], truths, scores, np.full(5, 0.5), [*"abcd", "$x$"])
    shown = {t.get_text(): to_hex(t.get_color()).upper() for t in texts(figure)}
    assert shown["✓ a 0.90"] == GREEN
    assert shown["✗ b 0.80"] == ORANGE
    assert shown["○ c 0.30"] == GREY
    assert "? $x$ 0.70" in shown
    assert not any(" d " in text for text in shown)


def test_labels_without_a_line_are_counted():
    figure = prediction_gallery(IMAGES[:1], np.ones((1, 9)), np.ones((1, 9)), np.zeros(9), names_of(9), max_labels=4)
    assert "… and 6 more" in [t.get_text() for t in texts(figure)]


def test_attention_maps_are_sorted_by_score():
    scores = np.array([[0.6, 0.9, 0.1], [0.1, 0.2, 0.3]])
    maps = np.random.default_rng(0).random((2, 3, 2, 2))
    figure = attention_gallery(IMAGES[:2], maps, np.zeros((2, 3)), scores, np.full(3, 0.5), list("abc"))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["", "✗ b 0.90", "✗ a 0.60", "", "○ c 0.30"]


def test_uniform_attention_is_transparent_and_a_peak_is_opaque():
    maps = np.full((1, 2, 3, 3), 1 / 9)
    maps[0, 1] = 0.01
    maps[0, 1, 2, 0] = 0.92
    figure = attention_gallery(IMAGES[:1], maps, np.ones((1, 2)), np.ones((1, 2)), np.zeros(2), ["even", "peak"])
    even, peak = (axes.images[1].get_array()[..., 3] for axes in figure.axes[1:])
    assert even.max() < 1e-3
    expected = np.zeros((3, 3))
    expected[2, 0] = 0.85
    np.testing.assert_allclose(peak, expected, atol=1e-6)


def test_context_map_sorts_and_frames_contexts():
    S = np.arange(25.0).reshape(5, 5) / 25
    partition = np.array([1, 0, 1, 0, 1])
    figure = context_map(S, partition, list("abcde"))
    axes = figure.axes[0]
    order = ["abcde".index(t.get_text()) for t in axes.get_yticklabels()]
    assert partition[order].tolist() == [0, 0, 1, 1, 1]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    expected = S[np.ix_(order, order)]
    off_diagonal = ~np.eye(5, dtype=bool)
    assert np.array_equal(shown[off_diagonal], expected[off_diagonal])
    frames = [(p.get_x(), p.get_width()) for p in axes.patches]
    assert frames == [(-0.5, 2), (1.5, 3)]
    assert np.array_equal(S, np.arange(25.0).reshape(5, 5) / 25)  # not changed


def test_curves_from_a_logger_file_and_from_a_dict(tmp_path: Path):
    file = tmp_path / "metrics.csv"
    file.write_text(
        "epoch,pseudo/precision,step,train/loss_unsup,val/mAP,val/specific_gain\n"
        "0,,3,0.0,,\n0,,3,,0.5,-0.125\n1,0.75,9,2.5,,\n1,,9,,0.625,0.25\n"
    )
    history = {
        "val/mAP": {0: 0.5, 1: 0.625},
        "val/specific_gain": {0: -0.125, 1: 0.25},
        "pseudo/precision": {1: 0.75},
        "train/loss_unsup": {0: 0.0, 1: 2.5},
    }
    assert read_history(file) == history
    for source in (file, history):
        figure = training_curves(source, warmup_epochs=1)
        assert_readable(figure)
        mAP, gain, pseudo, loss = figure.axes
        assert mAP.lines[0].get_xydata().tolist() == [[0, 50], [1, 62.5]]
        assert gain.lines[0].get_xydata().tolist() == [[0, -12.5], [1, 25]]
        assert pseudo.lines[0].get_xydata().tolist() == [[1, 75]]
        assert loss.lines[0].get_xydata().tolist() == [[1, 2.5]]
    with pytest.raises(DataError, match="no curve"):
        training_curves({"lr": {0: 1.0}})
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        training_curves(tmp_path / "nowhere.csv")


def test_bars_are_sorted_and_averaged():
    figure = per_class_bars(np.array([0.25, np.nan, 0.75]), list("abc"))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "a", "b"]
    assert [bar.get_width() for bar in axes.patches] == [75, 25, 0]
    assert "mean 50.0" in figure.get_suptitle()
    assert "no positive image" in [t.get_text() for t in axes.texts]
    assert "mean" not in per_class_bars(np.array([np.nan]), ["a"]).get_suptitle()


def test_missing_images_raise_an_error():
    with pytest.raises(DataError, match="no image"):
        prediction_gallery(IMAGES[:0], np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(2), ["a", "b"])
