"""Compares cached features with those computed from images, and tests when they are recomputed."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_lightning.data.augmentations import CutoutRandAugment
from cbsa_lightning.data.caches.feature_cache import FeatureCache, KeptViews, StrongInTurn, Tower
from cbsa_lightning.data.images import ImageFiles
from cbsa_lightning.data.samplers import Draw
from cbsa_lightning.data.views import PlainView, StrongView, WeakView
from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.labelers import LabeledOnly
from tiny_clip import tiny_clip
from tiny_data import SIZE, Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer
from zero_shot import zero_shot_mAP


class Count(L.Callback):
    """Counts images in the frozen tower: before training, in steps, and in passes without gradient."""

    def __init__(self):
        self.before = self.steps = self.passes = 0

    def setup(self, trainer, module, stage):
        self.started, compute = False, module.network.features

        def counted(images):
            name = "before" if not self.started else "steps" if module.training else "passes"
            setattr(self, name, getattr(self, name) + len(images))
            return compute(images)

        module.network.features = counted

    def on_train_start(self, trainer, module):
        self.started = True


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


def cached_fit(folder, clip, source, strong=0, cache=None, **settings):
    count = Count()
    data = {"feature_cache": cache or FeatureCache(str(folder / "cache"), strong), **settings.pop("data", {})}
    trainer = {"callbacks": [count], **settings.pop("trainer", {})}
    module, trainer = tiny_fit(folder, clip, source, data=data, trainer=trainer, **settings)
    return module, trainer, count


def test_cached_views_equal_the_views_of_training(squares):
    files, contents = ImageFiles(squares.train()), [bytes([i]) * 32 for i in range(22)]
    views = KeptViews(files, contents, np.ones((22, 4), dtype=bool), SIZE, CutoutRandAugment())
    plain, mirrored, first, second = views.make(3, [0, 1, 2, 3])
    assert torch.equal(plain, PlainView(SIZE)(files[3]))
    assert torch.equal(mirrored, plain.flip(-1))
    place = int.from_bytes(contents[3][:4], "little")
    for v, view in enumerate((first, second)):
        assert torch.equal(view, StrongView(SIZE, 0)(files[3], Draw(place, v, 0)))
    assert not torch.equal(first, second)
    weak = WeakView(SIZE, 5)
    flips = set()
    for epoch in range(8):
        draw = Draw(3, epoch, 0)
        flips.add(weak.flips(draw))
        assert torch.equal(weak(files[3], draw), (plain, mirrored)[weak.flips(draw)])
    assert flips == {True, False}
    assert len({views.key(row, column) for row in range(22) for column in range(4)}) == 88
    other = KeptViews(files, contents, views.needed, SIZE, CutoutRandAugment(0.25))
    assert other.key(3, 0) == views.key(3, 0)
    assert other.key(3, 2) != views.key(3, 2)


def test_strong_views_take_turns():
    turn = StrongInTurn(4)
    assert {turn(Draw(7, epoch, 0)) for epoch in range(4)} == {2, 3, 4, 5}
    assert turn(Draw(7, 1, 0)) == turn(Draw(7, 0, 1)) == turn(Draw(7, 5, 0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_cached_features_equal_those_of_the_images(tmp_path, clip_folder, squares, precision):
    """Features, loss and gradients are equal up to float16 rounding of the features."""
    settings = {"decoder_dropout": 0.0, "warmup_epochs": 0, "trainer": {"precision": precision}, "max_epochs": 1}
    cached, trainer, _ = cached_fit(tmp_path, clip_folder, squares, **settings)
    data, plain_data = trainer.datamodule, tiny_data(squares)
    plain_data.setup("fit")
    loaders = [(data.weak_dataloader(3), plain_data.weak_dataloader(3))]
    loaders.append((data.val_dataloader(), plain_data.val_dataloader()))
    seen = 0
    for kept, fresh in loaders:
        for batch, expected in zip(kept, fresh, strict=True):
            assert batch.images is None
            assert batch.features.dtype == torch.float16
            assert torch.equal(batch.index, expected.index)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                features = cached.network.features(expected.images)
            # float16 contains all but the smallest bfloat16 values; float32 values are rounded to 11 bits.
            torch.testing.assert_close(batch.features.float(), features.float(), rtol=2**-11, atol=1e-7)
            found = []
            for given in (batch.features, features):
                cached.zero_grad()
                output = cached.network(given)
                loss = cached.loss(output.logits, expected.targets).sum()
                loss.backward()
                gradients = [p.grad.flatten() for p in cached.network.parameters() if p.grad is not None]
                found.append((loss.detach(), torch.cat(gradients)))
            torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
            assert torch.linalg.vector_norm(found[0][1] - found[1][1]) < 5e-3 * torch.linalg.vector_norm(found[1][1])
            seen += len(features)
    assert seen == 14 + 7


def test_passes_without_gradient_read_no_images(tmp_path, clip_folder, squares):
    plain_count = Count()
    plain_module, plain = tiny_fit(tmp_path, clip_folder, squares, trainer={"callbacks": [plain_count]})
    assert plain_count.before == 0
    assert plain_count.passes == 2 * 7 + 2 * 14  # weak views: for the labels of an epoch, and for the final thresholds
    module, trainer, count = cached_fit(tmp_path, clip_folder, squares)
    assert count.passes == 0
    assert count.steps == plain_count.steps - 7 > 0  # without a cache, zero-shot CLIP also sees the test images
    assert (
        count.before == 14 * 2 + 8 + 7 + 1
    )  # two flips of the unlabeled images, the labeled and test images, and one to determine the shape
    # Thresholds used the same weights. (Later weights differ, since rounding may change pseudo-labels at ties.)
    assert module.tau_pos.isfinite().any()
    torch.testing.assert_close(module.tau_pos, plain_module.tau_pos, atol=5e-4, rtol=0)
    torch.testing.assert_close(module.tau_neg, plain_module.tau_neg, atol=5e-4, rtol=0)
    expected = zero_shot_mAP(module.network.clip, plain.datamodule)
    assert zero_shot_mAP(module.network.clip, trainer.datamodule) == pytest.approx(
        expected, abs=0.05
    )  # of seven images
    # A second run finds all features.
    again, _, count = cached_fit(tmp_path, clip_folder, squares)
    assert count.before == 1
    assert differences(module.state_dict(), again.state_dict()) == []


def test_cached_strong_views_replace_the_tower(tmp_path, clip_folder, squares):
    settings = {"data": {"held_out_fraction": 0.25, "num_workers": 2}}
    module, trainer, count = cached_fit(tmp_path, clip_folder, squares, strong=3, **settings)
    assert count.steps == count.passes == 0
    assert count.before == 14 * 2 + 8 + 7 + 3 * (6 + 14) + 1
    assert len(trainer.datamodule.split.held_out) == 2
    other, _, _ = cached_fit(tmp_path, clip_folder, squares, strong=3, data={"held_out_fraction": 0.25})
    assert differences(module.state_dict(), other.state_dict()) == [], "the weights depend on the number of workers"


def test_cached_features_are_read_without_workers_on_a_cpu(tmp_path, clip_folder, squares):
    _, trainer, _ = cached_fit(tmp_path, clip_folder, squares, max_epochs=1, data={"num_workers": 2})
    data = trainer.datamodule
    assert data.train_dataloader().num_workers == 2, "new strong views are computed from images"
    assert data.weak_dataloader(0).num_workers == data.val_dataloader().num_workers == 0
    gpu = SimpleNamespace(root_device=torch.device("cuda"))
    trainer_on_gpu = SimpleNamespace(strategy=gpu, world_size=1, global_rank=0, lightning_module=None)
    data.trainer = trainer_on_gpu
    assert data.weak_dataloader(0).num_workers == 2


def test_training_on_labels_only_caches_no_unlabeled_views(tmp_path, clip_folder, squares):
    _, trainer, count = cached_fit(tmp_path, clip_folder, squares, strong=2, labeler=LabeledOnly(), num_contexts=0)
    assert count.before == 3 * 8 + 7 + 1
    assert count.steps == 0
    data = trainer.datamodule
    (batch,) = data.plain_dataloader(data.split.unlabeled)  # for labels.csv, after training
    assert batch.features is None
    assert len(batch.images) == 14
    (batch,) = data.plain_dataloader(data.split.labeled)
    assert batch.images is None


def test_stale_features_are_never_used(tmp_path, clip_folder, squares):
    own = tmp_path / "own"
    shutil.copytree(squares.train().root, own)
    source = Squares(own)
    fit = {"max_epochs": 1, "warmup_epochs": 0}
    cache = FeatureCache(str(tmp_path / "cache"))
    assert cached_fit(tmp_path, clip_folder, source, cache=cache, **fit)[2].before == 44
    # The same files under other names: identified by their content.
    moved = tmp_path / "moved"
    shutil.copytree(own, moved)
    assert cached_fit(tmp_path, clip_folder, Squares(moved), cache=cache, **fit)[2].before == 1
    # One unlabeled image with other content: its two views.
    data = tiny_data(source)
    data.setup("fit")
    row = int(data.split.unlabeled[0])
    file = source.train().file(row)
    before = Image.open(file).copy()
    Image.fromarray(255 - np.asarray(before)).save(file)
    module, trainer, count = cached_fit(tmp_path, clip_folder, source, cache=cache, **fit)
    assert count.before == 3
    batch = next(iter(trainer.datamodule.weak_dataloader(0)))
    image = WeakView(SIZE, 3)(np.asarray(Image.open(file)), Draw(row, 0, 0))
    expected = module.network.features(image[None])[0]
    torch.testing.assert_close(batch.features[0].float(), expected, rtol=2**-11, atol=1e-7)
    before.save(file)
    # Other weights, size or precision: all views are recomputed.
    other = tiny_clip(tmp_path / "other", "resnet", seed=1)
    assert cached_fit(tmp_path, other, source, cache=cache, **fit)[2].before == 44
    sized = cached_fit(tmp_path, clip_folder, source, cache=cache, data={"image_size": 96}, **fit)
    assert sized[2].before == 44
    half = cached_fit(tmp_path, clip_folder, source, cache=cache, trainer={"precision": "bf16-mixed"}, **fit)
    assert half[2].before == 44
    assert len(list((tmp_path / "cache").glob("features-*"))) == 4


def test_another_activation_is_another_tower(tmp_path):
    """The weights are equal, so only the fingerprint of the tower's structure distinguishes the towers."""
    found = set()
    for name, changes in (("gelu", {}), ("quick", {"quick_gelu": True}), ("heads", {"vision_cfg": {"head_width": 8}})):
        network = tiny_module(tiny_clip(tmp_path / name, "vit", **changes)).network
        found.add(network.frozen_weights)
        assert network.clip.fingerprint == tiny_module(tmp_path / "gelu").network.clip.fingerprint
    assert len(found) == 3


def test_another_module_receives_images(tmp_path, clip_folder, squares):
    _, trainer, _ = cached_fit(tmp_path, clip_folder, squares, max_epochs=1)
    data = trainer.datamodule
    assert next(iter(data.val_dataloader())).images is None
    other = tiny_module(tiny_clip(tmp_path / "other", "resnet", seed=1))
    results = tiny_trainer(tmp_path).validate(other, datamodule=data, verbose=False)
    expected = tiny_trainer(tmp_path).validate(other, datamodule=tiny_data(squares), verbose=False)
    assert next(iter(data.val_dataloader())).images is not None
    assert results == expected


def test_features_are_not_computed_twice(tmp_path, clip_folder, squares, monkeypatch):
    """As after a crash, and as with two processes that each compute a share."""
    cache = FeatureCache(str(tmp_path / "cache"), strong_views=1)
    shares = [{"local_rank": rank, "num_devices": 2, "is_global_zero": rank == 0} for rank in range(2)]
    counts = []
    for rank in shares:
        data = tiny_data(squares, feature_cache=cache)
        data.setup("fit")
        data.trainer = SimpleNamespace(**rank, lightning_module=None, progress_bar_callback=None)
        module, count = tiny_module(clip_folder), Count()
        count.setup(None, module, "fit")
        tower = Tower(module.network.features, module.network.frozen_weights, "32-true")
        store, kept = data.compute_features(tower)
        counts.append(count.before)
        if len(counts) == 1:  # the other process has not computed its share yet
            with pytest.raises(DataError, match="features are missing"):
                data.use_features(tower, store, kept)
    assert sum(counts) == 14 * 2 + 8 + 22 + 7 + 2
    assert min(counts) > 20
    assert cached_fit(tmp_path, clip_folder, squares, cache=cache, max_epochs=1)[2].before == 1


@pytest.mark.parametrize("bars", [True, False])
def test_the_trainer_decides_whether_a_bar_is_shown(tmp_path, clip_folder, squares, capsys, bars):
    cached_fit(tmp_path, clip_folder, squares, max_epochs=1, trainer={"enable_progress_bar": bars})
    assert ("Frozen features" in capsys.readouterr().err) == bars


def test_refusals(tmp_path, clip_folder, squares, monkeypatch):
    with pytest.raises(ConfigError, match="strong_views must be an integer of at least 0, got -1"):
        FeatureCache(strong_views=-1)
    small = FeatureCache(str(tmp_path / "small"), strong_views=1000, limit_gb=0.01)
    with pytest.raises(ConfigError, match=r"features need .* GB.*0.01 GB are allowed.*Keep fewer strong views"):
        cached_fit(tmp_path, clip_folder, squares, cache=small)


def test_a_trained_tower_reads_images(tmp_path, clip_folder, squares, monkeypatch):
    """Reported, not refused: a machine's overlays apply to all systems of a table, even without a frozen tower."""
    monkeypatch.setattr(type(tiny_module(clip_folder).network), "frozen_weights", None)
    with pytest.warns(
        UserWarning, match=r"CBSANetwork has no frozen image tower.*strong views are drawn in every epoch"
    ):
        cached_fit(tmp_path, clip_folder, squares)
    assert not list(tmp_path.rglob("rows.bin"))


def test_overflowing_features_are_refused(tmp_path, clip_folder, squares, monkeypatch):
    network = type(tiny_module(clip_folder).network)
    compute = network.features
    monkeypatch.setattr(network, "features", lambda self, images: compute(self, images) * 1e6)
    with pytest.raises(DataError, match="overflow float16"):
        cached_fit(tmp_path, clip_folder, squares)
