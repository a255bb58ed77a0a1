"""The schedule has as many steps as the stage, also if ``max_epochs`` is not the only limit of training."""

from __future__ import annotations

import math
import warnings
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder

from cbsa_lightning.callbacks import limits
from cbsa_lightning.data.batch_sizes import default_labeled_per_batch, steps_per_epoch
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.training.schedules import OneCycle
from tiny_data import Squares, differences, tiny_data, tiny_fit


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


class Rates(L.Callback):
    """Records the learning rate of each optimizer step and the length of its schedule."""

    def __init__(self):
        self.steps, self.lengths = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append(optimizer.param_groups[0]["lr"])
        self.lengths.append(trainer.lr_scheduler_configs[0].scheduler.total_steps)


def fit(folder, clip, squares, *callbacks, max_epochs=None, ckpt_path=None, **trainer):
    rates = Rates()
    module, trainer = tiny_fit(
        folder,
        clip,
        squares,
        max_epochs=max_epochs,
        trainer={"callbacks": [*callbacks, rates], **trainer},
        ckpt_path=ckpt_path,
        data={"warmup_batch_size": 4},
        num_contexts=0,
    )
    return module, trainer, rates


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_max_steps_alone_sets_the_length(tmp_path, clip_folder, squares, max_epochs):
    _, trainer, rates = fit(tmp_path, clip_folder, squares, max_epochs=max_epochs, max_steps=8)
    assert trainer.global_step == 8
    assert rates.lengths == [3] * 2 + [6] * 6  # one-cycle has at least three steps
    assert rates.steps[-1] == min(rates.steps)


def test_with_max_epochs_max_steps_only_ends_training(tmp_path, clip_folder, squares):
    _, _, whole = fit(tmp_path, clip_folder, squares, max_epochs=3)
    _, trainer, rates = fit(tmp_path, clip_folder, squares, max_epochs=3, max_steps=4)
    assert trainer.global_step == 4 < len(whole.steps)
    assert rates.steps == whole.steps[:4]


def test_max_time_alone_is_refused(tmp_path, clip_folder, squares):
    with pytest.raises(ConfigError, match=r"max_epochs or trainer\.max_steps"):
        fit(tmp_path, clip_folder, squares, max_epochs=-1, max_time="00:00:00:05")


def test_max_time_with_epochs_ends_training(tmp_path, clip_folder, squares):
    _, trainer, _ = fit(tmp_path, clip_folder, squares, max_epochs=1000, max_time="00:00:00:01")
    assert 0 < trainer.current_epoch < 1000


@pytest.mark.parametrize("limit", [0, 0.0, 1, 0.5])
def test_the_schedule_follows_limit_train_batches(tmp_path, clip_folder, squares, limit):
    _, trainer, rates = fit(tmp_path, clip_folder, squares, max_epochs=6, limit_train_batches=limit)
    assert trainer.global_step == len(rates.steps)
    second = rates.lengths[-1] if limit else 0
    assert rates.lengths.count(second) == second


def test_changing_gradient_accumulation(tmp_path, clip_folder, squares):
    scheduler = GradientAccumulationScheduler({0: 2, 2: 1})
    _, trainer, rates = fit(tmp_path, clip_folder, squares, scheduler, max_epochs=5)
    batches = trainer.num_training_batches
    assert rates.lengths[-1] == -(-batches // 2) + 3 * batches == len(rates.steps) - 1


def test_a_run_stopped_by_steps_or_time_resumes_with_a_larger_limit(tmp_path, clip_folder, squares):
    whole, _, _ = fit(tmp_path, clip_folder, squares, max_epochs=3)
    for limit in (1, 4, 5):
        _, trainer, _ = fit(tmp_path, clip_folder, squares, max_epochs=3, max_steps=limit)
        assert trainer.global_step == limit
        trainer.save_checkpoint(tmp_path / "part.ckpt")
        resumed, trainer, _ = fit(
            tmp_path, clip_folder, squares, max_epochs=3, max_steps=100, ckpt_path=str(tmp_path / "part.ckpt")
        )
        assert trainer.current_epoch == 3, limit
        assert differences(whole.state_dict(), resumed.state_dict()) == [], limit


def test_the_learning_rate_finder_sets_the_rate_of_both_stages(tmp_path, clip_folder, squares):
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-5, early_stop_threshold=None)
    module, _, rates = fit(tmp_path, clip_folder, squares, finder, max_epochs=8)
    assert module.lr == finder.optimal_lr.suggestion()
    second = [rate for rate, length in zip(rates.steps, rates.lengths, strict=True) if length == rates.lengths[-1]]
    assert second[0] == pytest.approx(module.lr / 25)
    assert not list(tmp_path.glob(".lr_find*"))


def test_the_batch_size_finder_sets_the_batch_size(tmp_path, clip_folder, squares):
    finder = BatchSizeFinder(init_val=2, max_trials=2, steps_per_trial=1)
    _, trainer, rates = fit(tmp_path, clip_folder, squares, finder, max_epochs=3)
    assert trainer.datamodule.batch_size == finder.optimal_batch_size != 8
    assert rates.lengths[-1] == len(rates.steps) - rates.lengths.count(rates.lengths[0])
    assert not list(tmp_path.glob(".scale_batch_size*"))


def test_the_last_learning_rate_is_the_lowest(tmp_path, clip_folder, squares):
    _, _, rates = fit(tmp_path, clip_folder, squares, max_epochs=4)
    assert torch.tensor(rates.steps[-1]) == min(rates.steps)


def test_the_second_stage_can_have_a_different_schedule(tmp_path, clip_folder, squares):
    _, _, rates = fit(tmp_path, clip_folder, squares, max_epochs=3)
    whole = Rates()
    _, trainer = tiny_fit(
        tmp_path,
        clip_folder,
        squares,
        max_epochs=3,
        second_scheduler=OneCycle(cycle=1.5),
        trainer={"callbacks": [whole]},
    )
    warmup = whole.lengths.count(whole.lengths[0])
    assert 0 < warmup < trainer.global_step
    assert whole.steps[:warmup] == rates.steps[:warmup]
    second = trainer.global_step - warmup
    assert whole.lengths[warmup:] == [round(1.5 * second)] * second
    assert whole.steps[-1] > 10 * rates.steps[-1]


# Small data sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labeler", [None, LabeledOnly()])
def test_epochs_of_both_stages_have_the_minimum_number_of_steps(tmp_path, clip_folder, squares, labeler):
    rates = Rates()
    settings = {"num_contexts": 0, "labeler": labeler, "trainer": {"callbacks": [rates]}}
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, max_epochs=3, data={"min_steps_per_epoch": 7}, **settings)
    assert trainer.global_step == 21
    assert rates.lengths == [7] * 7 + [14] * 14
    assert rates.steps[-1] == min(rates.steps)


@pytest.mark.parametrize("known", [0.2, 0.4, 0.8])
def test_an_epoch_on_partial_labels_is_one_pass_at_any_known_fraction(tmp_path, clip_folder, squares, known):
    data = {"labeled_fraction": None, "known_fraction": known, "batch_size": 8, "warmup_batch_size": 8}
    settings = {"num_contexts": 0, "labeler": LabeledOnly(), "warmup_epochs": 0, "data": data}
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, max_epochs=2, **settings)
    split = trainer.datamodule.split
    assert bool(len(split.unlabeled)) == (known < 0.5)  # some images have no known label
    assert trainer.global_step == 2 * math.ceil((len(split.labeled) + len(split.unlabeled)) / 8)


@pytest.mark.parametrize("labeled", range(4, 200, 4))
def test_an_epoch_of_mostly_labeled_images_stays_short(labeled):
    batch, images = 20, 200
    per_batch = default_labeled_per_batch(labeled / images, batch)
    assert steps_per_epoch(images - labeled, batch - per_batch) <= 3 * images / batch  # 2 except for rounding
    if labeled <= images / 2:
        assert per_batch == math.floor(1.25 * labeled / images * batch + 0.5)


def test_longer_epochs_show_each_image_equally_often_in_different_views(squares):
    data = tiny_data(squares, min_steps_per_epoch=8)
    data.setup("fit")
    batches = list(data.train_dataloader().batch_sampler)
    assert len(batches) == 8
    unlabeled = [draw for batch in batches for draw in batch[data.labeled_per_batch :]]
    assert len(unlabeled) == 8 * (8 - data.labeled_per_batch)
    seen = Counter(draw.index for draw in unlabeled)
    assert seen.keys() == set(data.split.unlabeled.tolist())
    assert max(seen.values()) - min(seen.values()) == 1
    assert len({(draw.index, draw.visit) for draw in unlabeled}) == len(unlabeled)


def test_a_minimum_below_one_pass_has_no_effect(squares):
    plain, least = tiny_data(squares), tiny_data(squares, min_steps_per_epoch=2)
    for data in (plain, least):
        data.setup("fit")
    assert list(plain.train_dataloader().batch_sampler) == list(least.train_dataloader().batch_sampler)


def test_a_run_with_longer_epochs_resumes_within_an_epoch(tmp_path, clip_folder, squares):
    settings = {"max_epochs": 3, "data": {"min_steps_per_epoch": 7}, "ema_decay": None}
    whole, _ = tiny_fit(tmp_path, clip_folder, squares, **settings)
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, **settings, trainer={"max_steps": 16})
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, trainer = tiny_fit(tmp_path, clip_folder, squares, **settings, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert trainer.global_step == 21
    assert not differences(whole.state_dict(), resumed.state_dict())


def test_the_default_average_spans_a_seventh_of_the_second_stage(tmp_path, clip_folder, squares):
    settings = {"max_epochs": 3, "data": {"min_steps_per_epoch": 7}}
    module, _ = tiny_fit(tmp_path, clip_folder, squares, **settings, ema_decay=None)
    assert module.ema.decay == 1 - 7 / 14
    given, _ = tiny_fit(tmp_path, clip_folder, squares, **settings, ema_decay=0.5)
    assert not differences(module.state_dict(), given.state_dict())


@pytest.mark.parametrize(
    ("steps", "stages"),
    [(2, ["The warm-up has 4", "The second stage has 4"]), (5, ["The second stage has 5"]), (10, [])],
)
def test_stages_with_few_steps_are_reported(tmp_path, clip_folder, squares, monkeypatch, steps, stages):
    monkeypatch.setattr(limits, "FEW_STEPS", 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_fit(tmp_path, clip_folder, squares, max_epochs=3, warmup_epochs=2, data={"min_steps_per_epoch": steps})
    told = [text for text in (str(warning.message) for warning in caught) if "optimizer steps" in text]
    assert [text.partition(" optimizer")[0] for text in told] == stages
    if len(stages) == 2:
        assert "data.min_steps_per_epoch to 5 or more, or raise model.warmup_epochs" in told[0]
        assert "data.min_steps_per_epoch to 10 or more, or raise trainer.max_epochs" in told[1]
