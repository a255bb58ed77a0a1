"""The data module: contents of batches, errors, and when they are raised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.images import decode
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.splits import Split
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.errors import ConfigError, DataError
from tiny_data import CLASSES, SIZE, Squares, tiny_data, tiny_module, tiny_trainer


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


def ready(source, **settings):
    data = tiny_data(source, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


class Sized(Squares):
    """A given number of training rows without images, for code that only counts rows."""

    def __init__(self, number):
        paths = np.array([f"{i}.png" for i in range(number)], dtype=np.dtypes.StringDType())
        self._train = AnnotationTable("nowhere", paths, np.zeros((number, 5), np.int8), CLASSES)
        self._test = AnnotationTable("nowhere", paths[:1] + ".test", np.zeros((1, 5), np.int8), CLASSES)


def shares(number, monkeypatch, **settings):
    monkeypatch.setattr(AnnotationTable, "require_files", lambda self: None)
    data = tiny_data(Sized(number), **settings)
    data.setup("fit")
    return data.labeled_per_batch, data.warmup_batch_size


@pytest.mark.parametrize(("number", "size"), [(82081, 64), (5717, 8), (150000, 64), (5717, 64)])
def test_batch_sizes_for_the_papers_data_sets(number, size, monkeypatch):
    """4, 8, 12, 16 of 64 as in CAP, and 1, 1, 2, 2 of 8 for VOC; warm-up batches as in CAP, at most B."""
    found = [shares(number, monkeypatch, labeled_fraction=p, batch_size=size) for p in (0.05, 0.1, 0.15, 0.2)]
    expected = [(4, 16), (8, 32), (12, 48), (16, 64)] if size == 64 else [(1, 8), (1, 8), (2, 8), (2, 8)]
    assert found == expected


def test_custom_batch_sizes(monkeypatch):
    own = {"labeled_per_batch": 3, "warmup_batch_size": 5}
    assert shares(100, monkeypatch, batch_size=8, **own) == (3, 5)
    for wrong in (0, 8):
        with pytest.raises(ConfigError, match=f"between 1 and batch_size - 1 = 7, got {wrong}"):
            shares(100, monkeypatch, batch_size=8, labeled_per_batch=wrong)
    with pytest.raises(ConfigError, match="batch_size must be at least 2"):
        shares(100, monkeypatch, batch_size=1)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("image_size", (0, -1, 10**6)),
        ("seed", (-1, 2**32)),  # the range of numpy's generator for splits
        ("batch_size", (2**31, 2**63)),  # would fill batches with labeled images for hours
        ("labeled_per_batch", (2**31,)),
        ("warmup_batch_size", (0, -1, 2**31)),
        ("eval_batch_size", (0, -1, 2**63)),
        ("num_workers", (-1, 10**6)),
    ],
)
def test_invalid_settings_are_named(squares, setting, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"{setting} must be .*, got {value}"):
            tiny_data(squares, **{setting: value})


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -0.1, 1.5])
@pytest.mark.parametrize("setting", ["held_out_fraction", "labeled_fraction"])
def test_invalid_fractions_are_refused(squares, setting, share):
    with pytest.raises(ConfigError, match=f"{share}"):
        tiny_data(squares, **{setting: share}).setup("fit")


def test_labeled_share_of_a_partly_labeled_table(squares, monkeypatch):
    class Partly(Sized):
        def __init__(self):
            super().__init__(40)
            labels = np.full((40, 5), -1, np.int8)
            labels[:10, 0] = 1
            self._train = AnnotationTable("nowhere", self._train.paths, labels, CLASSES)

    monkeypatch.setattr(AnnotationTable, "require_files", lambda self: None)
    data = tiny_data(Partly(), labeled_fraction=None, batch_size=64)
    data.setup("fit")
    assert data.labeled_share == 0.25
    assert data.labeled_per_batch == 20


def test_contents_of_batches(squares):
    data = ready(squares)
    table, split = squares.train(), data.split
    assert (len(split.labeled), len(split.unlabeled), len(split.held_out)) == (8, 14, 0)
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(2)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [8, 8, 8, 6]
    view = StrongView(SIZE, seed=3)
    for batch in batches:
        assert batch.labeled.tolist() == [True] * 4 + [False] * (len(batch.images) - 4)
        assert batch.images.dtype == torch.uint8
        assert set(batch.index[:4].tolist()) <= set(split.labeled.tolist())
        assert (batch.targets[4:] == -1).all(), "a hidden label is in a training batch"
        np.testing.assert_array_equal(batch.targets[:4].numpy(), table.labels[batch.index[:4].numpy()])
    assert sorted(torch.cat([batch.index[4:] for batch in batches]).tolist()) == sorted(split.unlabeled.tolist())
    row = int(batches[1].index[5])
    assert torch.equal(batches[1].images[5], view(decode(table.file(row)), Draw(row, 2, 0)))


def test_weak_and_plain_views_come_in_order(squares):
    data = ready(squares, eval_batch_size=4)
    batches = list(data.weak_dataloader(epoch=5))
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == data.split.unlabeled.tolist()
    images, view = torch.cat([batch.images for batch in batches]), WeakView(SIZE, seed=3)
    for image, row in zip(images, index.tolist(), strict=True):
        assert torch.equal(image, view(decode(squares.train().file(row)), Draw(row, 5, 0)))
    flips = torch.cat([batch.images for batch in data.weak_dataloader(epoch=6)])
    assert not torch.equal(flips, images)
    (first, second) = list(data.val_dataloader())
    assert torch.cat([first.index, second.index]).tolist() == list(range(7))
    assert torch.equal(second.images[0], PlainView(SIZE)(decode(squares.test().file(4))))
    np.testing.assert_array_equal(torch.cat([first.targets, second.targets]).numpy(), squares.test().labels)


class Photographs(Squares):
    """The training images of Squares, enlarged to JPEGs of three times the size."""

    def __init__(self, folder, squares):
        table = squares.train()
        names = [f"{i}.jpg" for i in range(len(table))]
        for i, name in enumerate(names):
            Image.fromarray(decode(table.file(i))).resize((3 * SIZE, 4 * SIZE)).save(folder / name)
        paths = np.array(names, dtype=np.dtypes.StringDType())
        self._train = AnnotationTable(folder, paths, table.labels, CLASSES)
        self._test = None


@pytest.mark.parametrize(("fast", "at_least"), [(False, None), (True, SIZE)])
def test_every_loader_uses_fast_decode(tmp_path, squares, fast, at_least):
    source = Photographs(tmp_path, squares)
    data = ready(source, fast_decode=fast, held_out_fraction=0.25, predict=str(tmp_path))
    files = [decode(source.train().file(row), at_least) for row in range(22)]
    assert files[0].shape == ((2 * SIZE, 3 * SIZE // 2, 3) if fast else (4 * SIZE, 3 * SIZE, 3))
    for loader, view, rows in [
        (data.train_dataloader(), StrongView(SIZE, seed=3), range(22)),
        (data.weak_dataloader(0), WeakView(SIZE, seed=3), range(22)),
        (data.val_dataloader(), PlainView(SIZE), data.split.held_out),
    ]:
        batch = next(iter(loader))
        for image, row in zip(batch.images, batch.index.tolist(), strict=True):
            assert torch.equal(image, view(files[rows[row]], Draw(rows[row], 0, 0)))
    (batch,) = data.predict_dataloader()
    assert torch.equal(batch.images[0], PlainView(SIZE)(decode(data.predict_table().file(0), at_least)))


def test_leak_between_training_and_test_is_refused(squares_folder):
    class Leaky(Squares):
        def test(self):
            return self.train().select([3, 5])

    with pytest.raises(DataError, match=r"2 test image.*train/3.png, .*train/5.png.*remove them"):
        ready(Leaky(squares_folder))


def test_missing_images_are_named_before_training(squares_folder):
    class Missing(Squares):
        def train(self):
            table = super().train()
            paths = table.paths.copy()
            paths[6] = "train/nowhere.png"
            return AnnotationTable(table.root, paths, table.labels, CLASSES)

    with pytest.raises(DataError, match=r"train/nowhere.png \(row 6\)"):
        ready(Missing(squares_folder))


@pytest.mark.parametrize("warmup_epochs", [0, 3])
def test_training_requires_unlabeled_images(tmp_path, clip_folder, squares, warmup_epochs):
    module = tiny_module(clip_folder, warmup_epochs=warmup_epochs)
    before = module.network.log_scale.detach().clone()
    trainer = tiny_trainer(tmp_path, max_epochs=5)
    with pytest.raises(DataError, match=r"no unlabeled images.*labeled_fraction below 1.*LabeledOnly"):
        trainer.fit(module, datamodule=tiny_data(squares, labeled_fraction=1.0))
    assert trainer.global_step == 0
    assert torch.equal(module.network.log_scale, before)


def test_held_out_images(squares, squares_folder):
    data = ready(squares, held_out_fraction=0.25)
    assert len(data.split.held_out) == 2
    assert data.eval_table().paths.tolist() == squares.train().paths[data.split.held_out].tolist()
    assert not set(data.split.held_out) & {*data.split.labeled, *data.split.unlabeled}
    assert [batch.index.tolist() for batch in data.val_dataloader()] == [[0, 1]]
    assert [len(batch.index) for batch in data.test_dataloader()] == [7], "the test uses the source's test images"

    alone = ready(Squares(squares_folder, test=0))
    assert len(alone.split.held_out) == 1  # int(0.2 * 8), since there is no test table
    assert [len(batch.index) for batch in alone.test_dataloader()] == [1]
    with pytest.raises(ConfigError, match="no images for validation"):
        ready(Squares(squares_folder, test=0), held_out_fraction=0.0).val_dataloader()


def test_saved_split_is_reused(tmp_path, squares):
    first = ready(squares, held_out_fraction=0.25)
    first.split.save(tmp_path / "split.json", first.train_table)
    again = ready(squares, seed=99, split_file=str(tmp_path / "split.json"))
    assert again.split.digest == first.split.digest
    assert ready(squares, seed=99).split.digest != ready(squares).split.digest
    assert isinstance(again.split, Split)


def test_classes_are_known_before_tables_are_read(squares):
    data = tiny_data(squares)
    assert data.class_names == list(CLASSES) == data.prompt_names
    with pytest.raises(ConfigError, match="Specify the images to label"):
        data.predict_dataloader()


def test_lightnings_distributed_sampler_is_refused(tmp_path, squares):
    data = ready(squares)
    data.trainer = tiny_trainer(tmp_path, use_distributed_sampler=True)
    data.train_dataloader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(data.trainer), "world_size", 2)
        with pytest.raises(ConfigError, match="use_distributed_sampler=False"):
            data.train_dataloader()
