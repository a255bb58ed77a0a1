"""Tables of labels: decisions, review order, and reading them as a table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import entropy

from cbsa_lightning.data.readers.table import read_table
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.inference.labels.image_labels import ImageLabels, doubt_of, read_labels, write_labels

NAMES = ("cat", "dog", "sofa")
PROBABILITIES = np.array([[0.95, 0.02, 0.5], [0.1, 0.1, 0.1], [0.7, 0.85, 0.0], [1.0, 0.0, 0.99]], np.float32)
THRESHOLDS = np.array([0.6, 0.9, 0.4])


def labels(sure=0.8):
    images = np.array(["a.jpg", "b c.jpg", "d/ä.jpg", "e.jpg"], np.dtypes.StringDType())
    return ImageLabels.decided(images, NAMES, PROBABILITIES, THRESHOLDS, sure)


def test_decisions_follow_thresholds_and_uncertain_labels_are_reviewed():
    found = labels()
    assert found.names(found.given) == [["cat", "sofa"], [], ["cat"], ["cat", "sofa"]]
    assert found.names(found.review) == [["sofa"], [], ["cat", "dog"], []]  # dog has .85 and is not predicted
    assert not labels(sure=None).review.any()


def test_doubt_is_the_sum_of_binary_entropies():
    expected = [sum(entropy([p, 1 - p], base=2) for p in row) for row in PROBABILITIES.astype(np.float64)]
    np.testing.assert_allclose(doubt_of(PROBABILITIES), expected, rtol=1e-6, atol=1e-9)
    weighted = [
        sum(w * entropy([p, 1 - p], base=2) for w, p in zip((1, 2, 3), row, strict=True))
        for row in PROBABILITIES.astype(np.float64)
    ]
    np.testing.assert_allclose(doubt_of(PROBABILITIES, np.array([1, 2, 3])), weighted, rtol=1e-6, atol=1e-9)
    assert labels().places.tolist() == [2, 3, 1, 4]
    assert np.array(expected)[np.argsort(labels().places)].tolist() == sorted(expected, reverse=True)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_labels_reads_as_it_was_written(tmp_path, suffix):
    file = tmp_path / f"labels.{suffix}"
    write_labels(file, labels())
    found = read_labels(file)
    assert found.images.tolist() == labels().images.tolist()
    assert found.class_names == NAMES
    np.testing.assert_allclose(found.probabilities, PROBABILITIES, rtol=1e-6)
    assert np.array_equal(found.given, labels().given)
    assert np.array_equal(found.review, labels().review)


def test_json_lines_have_one_row_per_line(tmp_path):
    write_labels(tmp_path / "labels.jsonl", labels())
    lines = (tmp_path / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    row = json.loads(lines[2])
    assert row == {"image": "d/ä.jpg", "labels": "cat", "review": "cat;dog", "place": 1} | {
        name: pytest.approx(p) for name, p in zip(NAMES, PROBABILITIES[2].tolist(), strict=True)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("image,", "photo,", 1), "is not a table of labels"),
        (lambda text: text.replace("cat;sofa", "cat;sfoa", 1), "row 2 names 'sfoa'"),
        (lambda text: text.replace("0.95", "1.95", 1), r"not in \[0, 1\] in rows 2"),
        (lambda text: text.replace("0.95", "high", 1), "is not a number"),
        (lambda text: "", "cannot be read as a table of labels"),
    ],
)
def test_tables_of_another_format_are_refused(tmp_path, change, message):
    file = tmp_path / "labels.csv"
    write_labels(file, labels())
    file.write_text(change(file.read_text(encoding="utf-8").replace('"', "")), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_labels(file)


@pytest.mark.parametrize("name", ["place", "none", "a;b"])
def test_class_names_that_a_table_cannot_store_are_refused(tmp_path, name):
    images = np.array(["a.jpg"], np.dtypes.StringDType())
    found = ImageLabels.decided(images, ("cat", name), PROBABILITIES[:1, :2], THRESHOLDS[:2])
    with pytest.raises(ConfigError, match=f"cannot contain these classes: '{name}'"):
        write_labels(tmp_path / "labels.csv", found)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"written as .csv, .parquet, .jsonl"):
        write_labels(tmp_path / "labels.txt", labels())


def test_tables_of_labels_can_be_read_with_reviewed_labels_unknown(tmp_path):
    found = labels()
    write_labels(tmp_path / "labels.csv", found)
    table = read_table(tmp_path / "labels.csv")
    assert table.paths.tolist() == found.images.tolist()
    expected = np.where(found.review, -1, found.given.astype(np.int8))
    classes = [NAMES.index(name) for name in table.class_names]
    assert np.array_equal(table.labels, expected[:, classes])
    assert table.labels[1].tolist() == [0] * len(classes)  # a reviewed image without classes is labeled
