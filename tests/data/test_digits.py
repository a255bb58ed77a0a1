"""The generated digits data set: deterministic, complete or absent, and correctly labeled."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbsa_lightning.data import canvases
from cbsa_lightning.data.readers import digits as digits_module
from cbsa_lightning.data.readers.digits import GROUPS, NAMES, Digits, draw_labels
from cbsa_lightning.data.readers.source import Source
from cbsa_lightning.errors import ConfigError, DataError

SMALL = {"num_train": 12, "num_test": 6, "image_size": 64}


def content(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    source = Digits(root=str(tmp_path_factory.mktemp("digits")), **SMALL)
    source.prepare()
    return source


def test_class_names_need_no_files(tmp_path):
    source = Digits(root=str(tmp_path))
    assert isinstance(source, Source)
    assert source.class_names == source.prompt_names == NAMES
    assert sorted(name for names in source.contexts.values() for name in names) == sorted(NAMES)
    assert set(source.contexts) == set(canvases.SCENES)
    with pytest.raises(DataError, match="call prepare"):
        source.train()


def test_images_depend_on_the_seed(drawn, tmp_path):
    again = dataclasses.replace(drawn, root=str(tmp_path))
    again.prepare()
    other = dataclasses.replace(again, seed=1)
    other.prepare()
    first = content(drawn.folder)
    assert len(first) == 12 + 6 + 2
    assert content(again.folder) == first
    changed = {name for name, digest in content(other.folder).items() if first[name] != digest}
    assert changed == set(first)


def test_a_larger_set_starts_with_the_images_of_a_smaller_one(drawn, tmp_path):
    larger = dataclasses.replace(drawn, root=str(tmp_path), num_train=14)
    larger.prepare()
    first, more = content(drawn.folder), content(larger.folder)
    images = {name for name in first if name.endswith(".png")}
    assert {name: more[name] for name in images} == {name: first[name] for name in images}
    assert np.array_equal(larger.train().labels[:12], drawn.train().labels)


def test_tables_and_images(drawn):
    train, test = drawn.train(), drawn.test()
    assert (len(train), len(test)) == (12, 6)
    assert train.class_names == train.prompt_names == NAMES
    assert train.labels.dtype == np.int8
    for table in (train, test):
        for i in range(len(table)):
            with Image.open(table.file(i)) as image:
                assert image.mode == "RGB"
                assert image.size == (64, 64)
                assert np.asarray(image).std() > 5  # the image is not empty


def test_labels_are_the_drawn_digits(monkeypatch, tmp_path):
    asked: list[tuple[set[int], list[int]]] = []

    def recorded(rng, size, scene, digits: Sequence[int], source):
        pasted: list[int] = []
        glyph = canvases._glyph

        def watched(rng, source, row, size):
            pasted.append(int(source.digits[row]))
            return glyph(rng, source, row, size)

        with monkeypatch.context() as patch:
            patch.setattr(canvases, "_glyph", watched)
            image = canvases.draw_canvas(rng, size, scene, digits, source)
        asked.append((set(digits), pasted[-len(digits) :]))  # scraps are drawn first
        return image

    monkeypatch.setattr(digits_module, "draw_canvas", recorded)
    source = Digits(root=str(tmp_path), **SMALL)
    source.prepare()
    rows = np.concatenate([source.train().labels, source.test().labels])
    assert len(asked) == len(rows)
    for row, (digits, pasted) in zip(rows, asked, strict=True):
        assert set(np.flatnonzero(row)) == digits == set(pasted)
        assert 1 <= len(digits) == len(pasted) <= 4


def test_boxes_contain_their_digits(tmp_path):
    """Most differences between canvases with and without a digit are in its box."""
    source = canvases.exemplars("train")
    bare = np.asarray(canvases.draw_canvas(np.random.default_rng(3), 160, "meadow", [], source).image).astype(int)
    for digit in range(10):
        image, boxes = canvases.draw_canvas(np.random.default_rng(3), 160, "meadow", [digit], source)
        ys, xs = np.nonzero(np.abs(np.asarray(image).astype(int) - bare).max(-1) > 40)
        left, top, right, bottom = boxes[digit]
        assert list(boxes) == [digit]
        assert right - left == pytest.approx(bottom - top)
        inside = (left <= xs) & (xs <= right) & (top <= ys) & (ys <= bottom)
        assert inside.mean() > 0.9
        assert abs(xs.mean() - (left + right) / 2) < 6
        assert abs(ys.mean() - (top + bottom) / 2) < 6
    digits = Digits(root=str(tmp_path), **SMALL)
    digits.prepare()
    for part, table in (("train", digits.train()), ("test", digits.test())):
        assert [sorted(boxes) for boxes in digits.boxes(part)] == [np.flatnonzero(row).tolist() for row in table.labels]


def test_a_drawn_digit_changes_the_canvas_only_around_itself():
    source = canvases.exemplars("train")
    bare = np.asarray(canvases.draw_canvas(np.random.default_rng(3), 160, "meadow", [], source).image).astype(int)
    inked = np.asarray(canvases.draw_canvas(np.random.default_rng(3), 160, "meadow", [8], source).image).astype(int)
    ys, xs = np.nonzero(np.abs(inked - bare).max(-1) > 40)
    assert len(ys) > 100
    assert max(np.ptp(ys), np.ptp(xs)) < 0.42 * 160


def test_groups_share_images_and_some_digits_are_rare():
    labels = np.zeros((3000, 10), dtype=int)
    scenes = []
    for i in range(len(labels)):
        scene, digits = draw_labels(np.random.default_rng((7, i)))
        assert len(set(digits)) == len(digits)
        labels[i, digits] = 1
        scenes.append(scene)
    pairs = labels.T @ labels / labels.sum(0)  # column k: how often other digits occur with k
    group = np.empty(10, dtype=int)
    for number, members in enumerate(GROUPS.values()):
        group[list(members)] = number
    same = group[:, None] == group[None]
    within, across = pairs[same & ~np.eye(10, dtype=bool)], pairs[~same]
    assert within.min() > across.max()
    assert within.mean() > 5 * across.mean()
    share = labels.mean(0)
    assert share.max() > 2.5 * share.min() > 0.2
    # The scene depends on the group but does not determine it.
    expected = np.array(list(GROUPS))[group[labels.argmax(1)]]
    assert 0.5 < np.mean(expected == np.array(scenes)) < 0.75


def test_parts_use_all_exemplars_and_share_none():
    parts = [canvases.exemplars(part) for part in ("train", "test", "pretrain")]
    assert sum(len(part.digits) for part in parts) == 1797
    for part in parts:
        assert np.bincount(part.digits, minlength=10).min() > 40
        assert 0 <= part.images.min() < part.images.max() <= 1
    images = [{image.tobytes() for image in part.images} for part in parts]
    assert all(images[a].isdisjoint(images[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_prepare_reuses_a_complete_data_set(drawn, monkeypatch):
    monkeypatch.setattr(digits_module, "draw_canvas", lambda *_: pytest.fail("drew again"))
    drawn.prepare()


def test_prepare_names_missing_files(tmp_path):
    source = Digits(root=str(tmp_path), num_train=3, num_test=2, image_size=64)
    source.prepare()
    source.train().file(1).unlink()
    with pytest.raises(DataError, match=r"train/000001\.png"):
        source.prepare()
    table = source.folder / "test.csv"
    table.write_text(table.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(DataError, match=r"test\.csv does not contain the generated table of 2 images"):
        source.test()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_module, "draw_canvas", stop)
    source = Digits(root=str(tmp_path), **SMALL)
    with pytest.raises(KeyboardInterrupt):
        source.prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_that_finishes_later_keeps_the_first_result(drawn, tmp_path, monkeypatch):
    source = dataclasses.replace(drawn, root=str(tmp_path))
    draw = Digits._draw

    def slow_draw(self, draft, part):
        draw(self, draft, part)
        if part == "test":  # meanwhile the other process has finished
            monkeypatch.setattr(Digits, "_draw", draw)
            source.prepare()

    monkeypatch.setattr(Digits, "_draw", slow_draw)
    source.prepare()
    assert content(source.folder) == content(drawn.folder)
    assert [path.name for path in tmp_path.iterdir()] == [source.folder.name]


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_test": -1}, {"image_size": 32}, {"seed": -1}])
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Digits(**wrong)
