"""Splits: the sizes of the paper's tables, files tied to a table, and partial-label masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbsa_lightning.data import annotations
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.splits import Split, hold_out, split_known, split_labeled
from cbsa_lightning.errors import ConfigError, DataError


def table(labels, paths=None):
    paths = [f"{i}.jpg" for i in range(len(labels))] if paths is None else paths
    names = tuple(f"class {k}" for k in range(np.shape(labels)[1]))
    return AnnotationTable(Path("/images"), np.array(paths), np.array(labels), names)


@pytest.mark.parametrize(
    ("num_images", "sizes"),
    [
        (5717, (285, 571, 857, 1143)),
        (82081, (4104, 8208, 12312, 16416)),
        (150000, (7500, 15000, 22500, 30000)),
    ],
)
def test_sizes_in_the_paper(num_images, sizes):
    for fraction, size in zip((0.05, 0.10, 0.15, 0.20), sizes, strict=True):
        split = split_labeled(num_images, fraction, seed=1)
        assert (len(split.labeled), len(split.unlabeled)) == (size, num_images - size)


def test_rows_follow_the_legacy_permutation():
    split = split_labeled(100, 0.25, seed=3)
    np.random.seed(3)  # noqa: NPY002 - the same stream through numpy's global state, as CAP draws it
    order = np.arange(100)
    np.random.shuffle(order)  # noqa: NPY002
    assert split.labeled.tolist() == order[:25].tolist()
    assert split.unlabeled.tolist() == order[25:].tolist()
    assert split.labeled.dtype == np.int64
    assert (split.fraction, split.seed, len(split.held_out)) == (0.25, 3, 0)


def test_first_rows_are_pinned():
    # A change here would silently change the meaning of every saved fraction and seed.
    assert split_labeled(20, 0.25, seed=1).labeled.tolist() == [3, 16, 6, 10, 2]


@given(st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_parts_cover_all_rows_once(num_images, fraction, seed):
    if int(fraction * num_images) == 0:
        with pytest.raises(ConfigError, match="leaves no labeled image"):
            split_labeled(num_images, fraction, seed)
        return
    split = split_labeled(num_images, fraction, seed)
    rows = np.concatenate([split.labeled, split.unlabeled])
    assert sorted(rows.tolist()) == list(range(num_images))


def test_splits_are_nested_over_fractions_and_differ_over_seeds():
    small, large = split_labeled(1000, 0.05, 7), split_labeled(1000, 0.2, 7)
    assert set(small.labeled.tolist()) < set(large.labeled.tolist())
    assert small.digest == split_labeled(1000, 0.05, 7).digest
    assert small.digest != split_labeled(1000, 0.05, 8).digest


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, 5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError, match="must be greater than 0 and at most 1"):
        split_labeled(100, fraction, 1)


def test_empty_fraction():
    with pytest.raises(ConfigError, match=r"0\.001 of 100 images leaves no labeled images; use at least 0\.01"):
        split_labeled(100, 0.001, 1)
    with pytest.raises(ConfigError, match="the table has no rows"):
        split_labeled(0, 0.5, 1)


def test_split_known():
    t = table([[1, 0], [-1, -1], [-1, 0], [-1, -1]])
    split = split_known(t)
    assert split.labeled.tolist() == [0, 2]
    assert split.unlabeled.tolist() == [1, 3]
    assert (split.fraction, split.seed, split.table_digest) == (None, None, t.digest())
    with pytest.raises(DataError, match="all 2 rows"):
        split_known(table([[-1, -1], [-1, -1]]))


def test_hold_out():
    split = split_labeled(1000, 0.2, 1)
    kept = hold_out(split, 0.1, seed=5)
    assert (len(kept.labeled), len(kept.held_out)) == (180, 20)
    assert kept.unlabeled.tolist() == split.unlabeled.tolist()
    assert set(kept.labeled) | set(kept.held_out) == set(split.labeled)
    assert [i for i in split.labeled.tolist() if i in set(kept.labeled)] == kept.labeled.tolist()
    assert hold_out(split, 0.1, seed=5).digest == kept.digest
    assert hold_out(split, 0.1, seed=6).digest != kept.digest
    with pytest.raises(ConfigError, match="already held out"):
        hold_out(kept, 0.1, seed=5)


@pytest.mark.parametrize("fraction", [0, 0.001, 1, 1.5, -1])
def test_hold_out_refused(fraction):
    with pytest.raises(ConfigError, match="of 20 labeled images cannot be held out"):
        hold_out(split_labeled(100, 0.2, 1), fraction, 1)


def test_parts_are_disjoint():
    with pytest.raises(DataError, match="rows that occur more than once: 2"):
        Split(np.array([1, 2]), np.array([2, 3]))
    with pytest.raises(DataError, match="-1 is negative"):
        Split(np.array([-1, 2]), np.array([3]))
    with pytest.raises(DataError, match="labeled has shape"):
        Split(np.array([0.5]), np.array([3]))


def test_save_and_load(tmp_path):
    t = table(np.eye(40, 3, dtype=np.int8))
    split = hold_out(split_labeled(40, 0.5, 9), 0.2, 9)
    path = tmp_path / "new" / "split.json"
    with pytest.raises(ConfigError, match=r"save\(path, table\)"):
        split.save(path)
    split.save(path, t)
    back = Split.load(path, t)
    for part in ("labeled", "unlabeled", "held_out"):
        assert getattr(back, part).tolist() == getattr(split, part).tolist()
        assert getattr(back, part).dtype == np.int64
    assert (back.fraction, back.seed, back.table_digest, back.digest) == (0.5, 9, t.digest(), split.digest)


SAVED = (
    '{"format": "cbsa_lightning split 1", "table_digest": "T", '
    '"digest": "e3325bde7d3df128e45b0dd0977bc4e736b27d4defaa25e17734d986a9d786d7", "fraction": 0.25, "seed": 1, '
    '"labelled": [3, 16, 10], "unlabelled": [14, 4, 17, 7, 1, 13, 0, 19, 18, 9, 15, 8, 12, 11, 5], '
    '"held_out": [6, 2]}\n'
)


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 1000])
def test_file_format_of_the_first_release(tmp_path, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(annotations, "_ROWS", rows_at_a_time)
    t = table(np.eye(20, 3, dtype=np.int8))
    path = tmp_path / "split.json"
    hold_out(split_labeled(20, 0.25, 1), 0.4, 2).save(path, t)
    assert path.read_text(encoding="utf-8") == SAVED.replace('"T"', f'"{t.digest()}"')
    assert Split.load(path, t).held_out.tolist() == [6, 2]


@given(st.lists(st.lists(st.integers(-1, 12), max_size=6), min_size=3, max_size=3))
def test_refused_rows_equal_those_of_a_plain_count(parts):
    rows = sorted(row for part in parts for row in part)
    twice = sorted({row for row in rows if rows.count(row) > 1})
    parts = [np.array(part, dtype=np.int64) for part in parts]
    if -1 in rows:
        with pytest.raises(DataError, match="row -1 is negative"):
            Split(*parts)
    elif twice:
        with pytest.raises(DataError, match=f"rows that occur more than once: {', '.join(map(str, twice))};"):
            Split(*parts)
    else:
        Split(*parts)


def test_load_refuses_another_table(tmp_path):
    t = table([[1, 0], [0, 1], [1, 1]])
    other = table([[1, 0], [0, 1], [1, 0]])
    path = tmp_path / "split.json"
    split_known(t).save(path)
    with pytest.raises(DataError) as error:
        Split.load(path, other)
    assert t.digest() in str(error.value)
    assert other.digest() in str(error.value)
    assert str(path) in str(error.value)


def test_load_refuses_other_files(tmp_path):
    t = table([[1, 0], [0, 1], [-1, -1]])
    path = tmp_path / "split.json"
    with pytest.raises(DataError, match="the split file does not exist"):
        Split.load(path, t)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as a split"):
        Split.load(path, t)
    path.write_text("[]")
    with pytest.raises(DataError, match="the file is not a split"):
        Split.load(path, t)
    split_known(t).save(path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"labelled": [1, 0]}))
    with pytest.raises(DataError, match="changed after it was written"):
        Split.load(path, t)
    path.write_text(json.dumps(record | {"labelled": [0, 0]}))
    with pytest.raises(DataError, match="rows that occur more than once"):
        Split.load(path, t)
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "seed"}))
    with pytest.raises(DataError, match="it lacks seed"):
        Split.load(path, t)


def made_good(record):
    """Replaces the digest by the one in the error message, as a user might."""
    return record | {"digest": Split(record["labelled"], record["unlabelled"], record["held_out"]).digest}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labelled": [0, [1]]}, "labelled must be a list of row numbers"),
        ({"labelled": [True, 0]}, "labelled must be a list of row numbers"),
        ({"labelled": [0.0]}, "labelled must be a list of row numbers"),
        ({"labelled": [2**64]}, "labelled must be a list of row numbers"),
        ({"labelled": 0}, "labelled must be a list of row numbers"),
        ({"labelled": {"0": 1}}, "labelled must be a list of row numbers"),
        ({"held_out": None}, "held_out must be a list of row numbers"),
        ({"fraction": "half"}, "fraction must be .* found 'half'"),
        ({"fraction": True}, "fraction must be .* found True"),
        ({"fraction": float("nan")}, "fraction must be .* found nan"),
        ({"fraction": 5}, "fraction must be .* found 5"),
        ({"seed": 1.5}, "seed must be .* found 1.5"),
        ({"seed": [1]}, r"seed must be .* found \[1\]"),
    ],
)
def test_load_refuses_values_of_the_wrong_type(tmp_path, change, words):
    t = table([[1, 0], [0, 1], [-1, -1]])
    path = tmp_path / "split.json"
    split_known(t).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=words) as error:
        Split.load(path, t)
    assert str(path) in str(error.value)


def test_load_refuses_rows_that_the_table_does_not_have(tmp_path):
    t = table([[1, 0], [0, 1], [-1, -1]])
    path = tmp_path / "split.json"
    split_known(t).save(path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(made_good(record | {"unlabelled": [2, 3, 10**6]})))
    with pytest.raises(DataError, match=r"split\.json: the split contains rows 3, 1000000, but the table has 3 rows"):
        Split.load(path, t)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "recursion"),
        ('{"seed": 1, "seed": 2}', "a key occurs twice"),
        ('{"seed": ' + "1" * 5_000 + "}", "digits"),
        ("\ufeff{", "cannot be read as a split"),
    ],
)
def test_load_refuses_malicious_json(tmp_path, content, words):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        Split.load(path, table([[1, 0]]))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("fraction", [float("nan"), float("inf"), -float("inf")])
def test_hold_out_of_nan(fraction):
    with pytest.raises(ConfigError, match="of 20 labeled images cannot be held out"):
        hold_out(split_labeled(100, 0.2, 1), fraction, 1)


def test_rows_beyond_64_bits():
    with pytest.raises(DataError, match="labeled has shape"):
        Split(np.array([2**63], dtype=np.uint64), np.array([0]))


def test_rows_to_keep_are_not_held_out():
    split = split_labeled(100, 0.5, seed=3)
    plain = hold_out(split, 0.2, seed=5)
    assert hold_out(split, 0.2, seed=5, keep=[]).digest == plain.digest
    keep = split.labeled[:45]
    found = hold_out(split, 0.2, seed=5, keep=keep)
    assert set(found.held_out) == set(split.labeled[45:])  # 10 are requested, 5 are left
    assert set(found.labeled) == set(keep)
    with pytest.raises(ConfigError, match="their validation score would be too high"):
        hold_out(split, 0.2, seed=5, keep=split.labeled)
