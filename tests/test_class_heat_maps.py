"""Heat maps of classes and epochs, and the table with the same values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cbsa_lightning.errors import DataError
from cbsa_lightning.reports.class_heat_maps import MEASURES, class_heat_maps
from cbsa_lightning.reports.run_tables import pseudo_label_table


def history(classes: int, epochs: int, first: int = 3) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {first + i: rng.random((len(MEASURES), classes)) for i in range(epochs)}
    for values in found.values():
        values[MEASURES.index("positives")] = rng.integers(0, 900, classes)
        values[MEASURES.index("context")] = rng.integers(0, 12, classes)
    return found


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def test_each_measure_is_one_map_of_classes_and_epochs():
    values = history(5, 4)
    found = panels(class_heat_maps(values, list("abcde")))
    assert list(found) == ["precision", "recall", "coverage", "positives", "threshold τ+", "threshold τ-", "context"]
    for i, axes in enumerate(found.values()):
        np.testing.assert_array_equal(axes.images[0].get_array(), np.stack([values[e][i] for e in (3, 4, 5, 6)], 1))
        assert [text.get_text() for text in axes.get_xticklabels()] == ["3", "4", "5", "6"]
    assert [text.get_text() for text in found["precision"].get_yticklabels()] == list("abcde")


@pytest.mark.parametrize("classes", [10, 80])
def test_labels_do_not_overlap(classes):
    figure = class_heat_maps(history(classes, 40), [f"a class with a long name {k}" for k in range(classes)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in panels(figure).values():
        for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
            boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: (box.y0, box.x0))
            for one, other in pairwise(boxes):
                assert not one.padded(-1).overlaps(other.padded(-1))
    first = panels(figure)["precision"].get_yticklabels()
    assert min(label.get_window_extent(renderer).x0 for label in first) >= 0


def test_unknown_measures_are_omitted_and_equal_epochs_are_drawn_once():
    (values,) = history(4, 1).values()
    values[[MEASURES.index(name) for name in ("precision", "recall", "tau_pos", "tau_neg")]] = np.nan
    found = panels(class_heat_maps({5: values, 6: values}, list("abcd")))
    assert list(found) == ["coverage", "positives", "context"]
    assert found["coverage"].images[0].get_array().shape == (4, 1)
    assert [text.get_text() for text in found["coverage"].get_xticklabels()] == ["all epochs"]


def test_only_the_worst_of_many_classes_are_drawn():
    values = history(150, 2)
    figure = class_heat_maps(values, [str(k) for k in range(150)])
    shown = [int(text.get_text()) for text in panels(figure)["precision"].get_yticklabels()]
    assert shown == sorted(np.argsort(values[4][0])[:100].tolist())


def test_no_epoch_is_refused():
    with pytest.raises(DataError, match="no epochs"):
        class_heat_maps({}, ["a"])


def test_the_table_has_a_row_for_each_class_and_epoch():
    values = history(2, 2)
    values[3][0, 1] = np.nan
    table = pseudo_label_table(values, ["a", "b"])
    assert table.columns == ["epoch", "class", *MEASURES]
    assert [row[:2] for row in table.rows] == [[3, "a"], [3, "b"], [4, "a"], [4, "b"]]
    assert table.rows[1][2] is None
    assert table.rows[2][2:-1] == values[4][:-1, 0].tolist()
    assert table.rows[2][-1] == values[4][-1, 0] + 1


def test_a_long_table_has_fewer_epochs_but_the_last():
    table = pseudo_label_table(history(3000, 7, first=0), [str(k) for k in range(3000)])
    assert sorted({row[0] for row in table.rows}) == [0, 3, 6]
