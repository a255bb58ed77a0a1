"""Loader workers change only the speed: views are bit-identical, and so is the run."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from cbsa_lightning.data.caches.feature_cache import FeatureCache
from tiny_data import Squares, differences, tiny_data, tiny_fit

SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (1, 4)]
EPOCHS = 3  # one of them warm-up


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


def views(source, workers):
    """Returns all batches of two passes of each loader: strong, weak and plain views."""
    data = tiny_data(source, num_workers=workers, eval_batch_size=4)
    data.setup("fit")
    torch.manual_seed(workers)  # views must not depend on the global state, nor change it
    before = torch.get_rng_state()
    train, plain = data.train_dataloader(), data.val_dataloader()
    found = []
    for epoch in (0, 3):
        train.batch_sampler.sampler.set_epoch(epoch)  # as Lightning does; draws tell persistent workers the epoch
        for loader in (train, data.weak_dataloader(epoch), plain, data.plain_dataloader(data.split.labeled)):
            found.append([(batch.index, batch.images, batch.targets) for batch in loader])
    assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.fixture(scope="module")
def alone(squares):
    return views(squares, 0)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_views(squares, alone, workers):
    found = views(squares, workers)
    assert [len(passed) for passed in found] == [4, 4, 2, 2] * 2
    for one, other in zip(alone, found, strict=True):
        for expected, batch in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))
    strong = [torch.cat([batch[1] for batch in alone[i]]) for i in (0, 4)]
    assert not torch.equal(*strong), "the strong views of both epochs are equal"


class Steps(L.Callback):
    """Records images of each step and metrics of each epoch."""

    def __init__(self):
        self.images, self.figures = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.images.append((batch.index, batch.features if batch.images is None else batch.images))

    def on_train_epoch_end(self, trainer, module):
        names = trainer.callback_metrics.keys() - {"time/ms_per_image"}
        self.figures.append({name: float(trainer.callback_metrics[name]) for name in names})


def run(folder, clip_folder, squares, workers, **data):
    """Runs the paper's method with dropout and contexts, which detects changes of the global random state."""
    spy = Steps()
    module, _ = tiny_fit(
        folder,
        clip_folder,
        squares,
        max_epochs=EPOCHS,
        data={"num_workers": workers, "eval_batch_size": 4, "warmup_batch_size": 4, **data},
        trainer={"callbacks": [spy]},
        decoder_dropout=0.1,
    )
    tables = {"pseudo_labels": module.pseudo_labels, "context_targets": module.context_targets}
    return spy, {**module.state_dict(), **tables}


def same(first, second):
    (spy, state), (other, other_state) = first, second
    assert len(spy.images) == len(other.images) == 2 + 4 + 4
    for a, b in zip(spy.images, other.images, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert state.keys() == other_state.keys()
    assert differences(state, other_state) == []
    assert len(spy.figures) == EPOCHS
    for a, b in zip(spy.figures, other.figures, strict=True):
        assert a.keys() == b.keys()
        assert {"val/mAP", "val/mAP_raw", "train/loss"} <= a.keys()
        assert all(b[name] == pytest.approx(a[name], abs=0, rel=0, nan_ok=True) for name in a)


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory, clip_folder, squares):
    return run(tmp_path_factory.mktemp("alone"), clip_folder, squares, 0)


@pytest.mark.parametrize("workers", [2, *SLOW])
def test_a_run(tmp_path, clip_folder, squares, run_alone, workers):
    same(run_alone, run(tmp_path, clip_folder, squares, workers))
    _, state = run_alone
    assert set(state["pseudo_labels"].flatten().tolist()) == {-1, 0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_run_on_cached_features(tmp_path, clip_folder, squares, workers):
    """Workers read the images to fill the cache, and then the cache; each run has a separate cache."""
    first, second = (
        run(tmp_path, clip_folder, squares, w, feature_cache=FeatureCache(str(tmp_path / str(w)), strong_views=2))
        for w in (0, workers)
    )
    same(first, second)
