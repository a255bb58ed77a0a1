"""Masks of known labels: how they are drawn, kept and refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.label_masks import LabelMask, known_mask, make_mask, with_known_labels
from cbsa_lightning.errors import ConfigError, DataError


def a_table(labels, folder="."):
    labels = np.asarray(labels, dtype=np.int8)
    paths = np.array([f"{i}.png" for i in range(len(labels))], dtype=np.dtypes.StringDType())
    return AnnotationTable(folder, paths, labels, tuple("abcdefgh"[: labels.shape[1]]))


def random_table(n=300, classes=7, seed=0):
    return a_table(np.random.default_rng(seed).random((n, classes)) < 0.3)


def test_masks_are_nested_seeded_and_of_the_asked_share():
    masks = [known_mask(2000, 20, share, seed=4) for share in (0.1, 0.5, 0.9)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    for mask, share in zip(masks, (0.1, 0.5, 0.9), strict=True):
        assert mask.shape == (2000, 20)
        assert abs(mask.mean() - share) < 4 * np.sqrt(share * (1 - share) / mask.size)
    assert (masks[0] == known_mask(2000, 20, 0.1, seed=4)).all()
    assert (masks[0] != known_mask(2000, 20, 0.1, seed=5)).any()
    assert known_mask(5, 3, 1.0, 0).all()
    assert not known_mask(5, 3, 0.0, 0).any()
    with pytest.raises(ConfigError, match="must be between 0 and 1"):
        known_mask(5, 3, 10, 0)


def test_numbers_are_those_of_the_conventional_methods(monkeypatch):
    expected = np.random.RandomState(0).random((1000, 6)) < 0.3
    monkeypatch.setattr("cbsa_lightning.data.label_masks._ROWS", 17)
    np.testing.assert_array_equal(known_mask(1000, 6, 0.3, seed=0), expected)


def test_positives_and_negatives_are_hidden_alike():
    labels = np.random.default_rng(1).random((20_000, 5)) < 0.1
    known = known_mask(*labels.shape, 0.4, seed=2)
    for part in (labels, ~labels):
        assert abs(known[part].mean() - 0.4) < 4 * np.sqrt(0.24 / part.sum())


def test_a_mask_hides_the_other_labels():
    table = random_table()
    mask = LabelMask.draw(table, 0.5, seed=3)
    masked = mask(table)
    np.testing.assert_array_equal(masked.labels, np.where(mask.known, table.labels, -1))
    assert masked.digest() != table.digest()
    assert (masked.paths == table.paths).all()


def test_saved_masks_are_used_again(tmp_path):
    table = random_table()
    mask = LabelMask.draw(table, 0.3, seed=5)
    mask.save(tmp_path / "new" / "mask.json")
    again = make_mask(table, file=str(tmp_path / "new" / "mask.json"), fraction=None, seed=99)
    np.testing.assert_array_equal(again.known, mask.known)
    assert (again.fraction, again.seed, again.digest, again.table_digest) == (0.3, 5, mask.digest, table.digest())
    drawn = make_mask(table, file=None, fraction=0.3, seed=5)
    assert drawn.digest == mask.digest
    assert make_mask(table, file=None, fraction=None, seed=5) is None
    own = LabelMask.of(table, mask.known)
    assert (own.digest, own.fraction, own.seed) == (mask.digest, None, None)


def test_masks_of_other_tables_are_refused(tmp_path):
    table = random_table()
    LabelMask.draw(table, 0.3, seed=5).save(tmp_path / "mask.json")
    labels = table.labels.copy()
    labels[7, 3] = 1 - labels[7, 3]
    for other in (a_table(labels), random_table(seed=1), random_table(n=299), random_table(classes=6)):
        with pytest.raises(DataError, match="was created for a table with digest"):
            LabelMask.load(tmp_path / "mask.json", other)
    for known in (np.ones((300, 6), dtype=bool), np.ones((300, 7), dtype=np.int8)):
        with pytest.raises(DataError, match=r"expected \(300, 7\) bool"):
            LabelMask.of(table, known)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"known": "AAAA"}, "does not have 300 x 7 entries"),
        ({"known": "%%"}, "cannot be read"),
        ({"known": 5}, "cannot be read"),
        ({"shape": [7, 300]}, "does not have"),
        ({"digest": "0" * 64}, "was changed after it was written"),
        ({"format": "another"}, "is not a valid label mask"),
    ],
)
def test_files_that_are_refused(tmp_path, change, words):
    table, path = random_table(), tmp_path / "mask.json"
    LabelMask.draw(table, 0.3, seed=5).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=words) as error:
        LabelMask.load(path, table)
    assert str(path) in str(error.value)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(DataError, match="label mask not found"):
        LabelMask.load(tmp_path / "none.json", random_table())
    (tmp_path / "mask.json").write_text("[1")
    with pytest.raises(DataError, match="cannot be read as a label mask"):
        LabelMask.load(tmp_path / "mask.json", random_table())


def test_settings_that_exclude_each_other():
    with pytest.raises(ConfigError, match="use only one of them"):
        make_mask(random_table(), file="mask.json", fraction=0.5, seed=1)
    with pytest.raises(ConfigError, match="leaves no known label"):
        make_mask(random_table(n=2), file=None, fraction=1e-9, seed=1)


def test_classes_without_a_known_negative_have_their_unknown_entries_absent():
    table = a_table([[1, -1, 0], [-1, 1, 1], [-1, -1, -1], [-1, 1, -1]])
    found, told = with_known_labels(table, None)
    assert found.labels.tolist() == [[1, 0, 0], [0, 1, 1], [-1, -1, -1], [0, 1, -1]]
    assert "2 of 3 classes have known positives but no known negative: a, b" in told


def test_single_positive_labels_are_completed_by_negatives():
    table = a_table([[1, -1, -1], [-1, -1, 1], [-1, -1, -1]])
    found, told = with_known_labels(table, None)
    assert found.labels.tolist() == [[1, -1, 0], [0, -1, 1], [-1, -1, -1]], "nothing is known of class b"
    assert told


def test_all_unknown_entries_of_labeled_images_absent_on_request():
    table = a_table([[1, -1, 0], [-1, 0, 1], [0, 1, -1], [-1, -1, -1]])
    assert with_known_labels(table, None) == (table, "")
    found, told = with_known_labels(table, None, unknown_as_absent=True)
    assert found.labels.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [-1, -1, -1]]
    assert told == ""
