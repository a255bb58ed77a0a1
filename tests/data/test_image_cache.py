"""The image cache: views equal those from files, each file is decoded once, and no image is stale."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_lightning.data import images as images_module
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.caches.image_cache import ImageCache
from cbsa_lightning.data.images import ImageFiles, decode
from cbsa_lightning.data.views import squash
from cbsa_lightning.errors import ConfigError, DataError
from tiny_data import CLASSES, Squares, tiny_data, tiny_module, tiny_trainer

SIZE = 40  # differs from the images, so that they are resized


def photographs(folder, number):
    """Writes different JPEG images of many shapes."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        shape = (*rng.integers(30, 120, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.jpg")
    return table_of(folder, [f"{i}.jpg" for i in range(number)])


def table_of(folder, names):
    paths = np.array(names, dtype=np.dtypes.StringDType())
    return AnnotationTable(folder, paths, np.zeros((len(names), len(CLASSES)), np.int8), CLASSES)


def require_equal(cached, table, at_least=None):
    for i in range(len(table)):
        image = cached[i]
        np.testing.assert_array_equal(image, squash(decode(table.file(i), at_least), SIZE))
        assert not image.flags.writeable


@pytest.fixture
def cache(tmp_path):
    return ImageCache(str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    """Returns the names of decoded files."""
    names, original = [], images_module.decode
    monkeypatch.setattr(images_module, "decode", lambda path, *rest: names.append(path.name) or original(path, *rest))
    return names


def test_images_are_decoded_once(tmp_path, cache, decoded):
    table = photographs(tmp_path / "images", 70)  # more than one chunk
    require_equal(cache.images(ImageFiles(table), SIZE), table)
    assert sorted(decoded) == sorted(table.paths.tolist())
    del decoded[:]
    require_equal(cache.images(ImageFiles(table), SIZE), table)
    rows = np.array([5, 3, 69])
    require_equal(cache.images(ImageFiles(table), SIZE).select(rows), table.select(rows))
    require_equal(pickle.loads(pickle.dumps(cache.images(ImageFiles(table), SIZE))), table)

    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    (tmp_path / "images" / "8.jpg").unlink()
    photographs(tmp_path / "other", 2)
    mixed = table_of(tmp_path, ["moved/3.jpg", "moved/9.jpg", "other/1.jpg", "images/7.jpg"])
    require_equal(cache.images(ImageFiles(mixed), SIZE), mixed)
    assert decoded == [], "these contents were cached already"
    (store,) = (tmp_path / "cache").glob("images-*")
    assert (store / "rows.bin").stat().st_size == 70 * SIZE**2 * 3


def test_a_changed_file_is_decoded_again(tmp_path, cache, decoded):
    table = photographs(tmp_path / "images", 4)
    before = cache.images(ImageFiles(table), SIZE)[2].copy()
    del decoded[:]
    Image.fromarray(np.full((50, 60, 3), 200, np.uint8)).save(table.file(2))
    after = cache.images(ImageFiles(table), SIZE)
    assert decoded == ["2.jpg"]
    require_equal(after, table)
    assert not np.array_equal(after[2], before)


def test_equal_files_share_a_row(tmp_path, cache, decoded):
    table = photographs(tmp_path / "images", 3)
    shutil.copy(table.file(1), tmp_path / "images" / "again.jpg")
    twice = table_of(table.root, [*table.paths.tolist(), "again.jpg"])
    cached = cache.images(ImageFiles(twice), SIZE)
    require_equal(cached, twice)
    assert len(cached.store) == len(decoded) == 3


def test_sizes_and_decoding_settings_are_separate(tmp_path, cache):
    table = photographs(tmp_path / "images", 12)
    for at_least in (None, SIZE):
        require_equal(cache.images(ImageFiles(table, at_least), SIZE), table, at_least)
    assert cache.images(ImageFiles(table), 8)[0].shape == (8, 8, 3)
    require_equal(cache.images(ImageFiles(table), SIZE), table)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "contents.json",
        "images-40",
        "images-40-fast",
        "images-8",
    ]
    with pytest.raises(
        ConfigError, match=r"images-40-fast.*decoded images were created with at_least 40 \(requested: 80"
    ):
        cache.images(ImageFiles(table, 80), SIZE)


def test_the_limit_is_checked_before_decoding(tmp_path, cache, decoded):
    table = photographs(tmp_path / "images", 9)
    small = replace(cache, limit_gb=8 * SIZE**2 * 3 / 1e9)
    with pytest.raises(ConfigError, match=r"9 more decoded images need 0\.0 GB.*Raise data\.image_cache\.limit_gb"):
        small.images(ImageFiles(table), SIZE)
    assert decoded == []
    small.images(ImageFiles(table.select(range(8))), SIZE)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_file_is_named_and_earlier_ones_are_cached(tmp_path, cache, num_workers):
    table = photographs(tmp_path / "images", 130)
    content = table.file(100).read_bytes()
    table.file(100).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"100\.jpg: .*truncated.*download or copy the file again"):
        cache.images(ImageFiles(table), SIZE, num_workers)
    table.file(100).write_bytes(content)
    rest = cache.images(ImageFiles(table.select(range(64))), SIZE)
    assert len(rest.store) >= 64
    require_equal(cache.images(ImageFiles(table), SIZE, num_workers), table)


@pytest.mark.slow  # imports torch in two new processes
def test_two_processes_fill_the_same_cache(tmp_path, cache):
    table = photographs(tmp_path / "images", 150)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parts = [table, table.select(range(149, 20, -1))]
        filled = [pool.submit(cache.images, ImageFiles(part), SIZE) for part in parts]
        for part, task in zip(parts, filled, strict=True):
            require_equal(task.result(), part)
    cached = cache.images(ImageFiles(table), SIZE)
    require_equal(cached, table)
    assert len(cached.store) == 150


# In the data module ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


def ready(source, **settings):
    data = tiny_data(source, image_size=SIZE, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def batches_of(data):
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(2)
    return [*loader, *data.weak_dataloader(4), *data.val_dataloader(), *data.test_dataloader()]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"held_out_fraction": 0.4}, {"fast_decode": True}])
def test_batches_from_the_cache_equal_those_from_files(squares, cache, settings):
    plain = batches_of(ready(squares, **settings))
    for _ in range(2):  # filled, then reused
        for one, other in zip(plain, batches_of(ready(squares, image_cache=cache, **settings)), strict=True):
            assert len(one.images) == len(other.images) > 0
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "targets", "index"))


def test_prepare_data_fills_the_cache_for_the_loaders(squares, cache, decoded):
    data = tiny_data(squares, image_size=SIZE, image_cache=cache, batch_size=8)
    state = torch.get_rng_state()
    data.prepare_data()
    assert len(decoded) == 22 + 7
    assert torch.equal(torch.get_rng_state(), state), "the cache changes the random state and thus the run"
    del decoded[:]
    data.setup("fit")
    assert sum(len(batch.images) for batch in batches_of(data)) > 0
    assert decoded == []


def test_setup_without_prepare_data_fills_the_cache(squares, cache, decoded):
    data = tiny_data(squares, image_size=SIZE, image_cache=cache)
    data.setup("fit")
    assert len(decoded) == 22 + 7


def test_prediction_does_not_fill_the_cache(tmp_path, clip_folder, squares, squares_folder, cache, decoded):
    data = tiny_data(squares, image_cache=cache, predict=str(squares_folder / "test"))
    data.trainer = tiny_trainer(tmp_path)
    data.trainer.predicting = True
    data.prepare_data()
    assert decoded == []
    assert sum(len(batch.images) for batch in data.predict_dataloader()) == 7
    assert not (tmp_path / "cache").exists()


def test_missing_images_are_named_before_decoding(squares_folder, cache, decoded):
    class Missing(Squares):
        def test(self):
            table = super().test()
            return AnnotationTable(table.root, ["test/nowhere.png"], table.labels[:1], CLASSES)

    with pytest.raises(DataError, match=r"test/nowhere.png \(row 0\)"):
        ready(Missing(squares_folder), image_cache=cache)


def test_training_from_the_cache_equals_training_from_files(tmp_path, clip_folder, squares, cache):
    states = []
    for settings in ({}, {"image_cache": cache}):
        module = tiny_module(clip_folder)
        tiny_trainer(tmp_path).fit(module, datamodule=tiny_data(squares, **settings))
        states.append(module.state_dict())
    for key in chain(*states):
        assert torch.equal(states[0][key], states[1][key]) or states[0][key].isnan().any()
