"""Zero-shot CLIP, the linear probe and stacked probes as systems: fit, checkpoint, predictions."""

from __future__ import annotations

import functools

import lightning as L
import numpy as np
import pytest
import torch

from cbsa_lightning import Classifier, SSMLLModule
from cbsa_lightning.callbacks.baselines import MeasureBaselines
from cbsa_lightning.callbacks.training_checks import TrainingChecks
from cbsa_lightning.data.caches.feature_cache import FeatureCache
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.linear_probe import LinearProbe
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.networks.zero_shot import ZeroShotCLIP
from tiny_data import Squares, tiny_data, tiny_fit, tiny_trainer

SYSTEMS = {
    "zero-shot": {"labeler": LabeledOnly()},
    "linear probe": {"labeler": LinearProbe(), "stack_share": 1.0},
    "stacked probes": {"labeler": StackedProbes(), "stack_share": 1.0},
}


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory, clip_folder, squares):
    """Returns the results of ``--compare`` for a run of CBSA on the same data."""
    measure = MeasureBaselines()
    tiny_fit(tmp_path_factory.mktemp("cbsa"), clip_folder, squares, trainer={"callbacks": [measure]})
    return measure.results


def fitted(folder, clip, squares, **settings):
    L.seed_everything(0, verbose=False)
    network = functools.partial(ZeroShotCLIP, clip=str(clip))
    module = SSMLLModule(Squares.class_names, network, warmup_epochs=3, **settings)
    trainer = tiny_trainer(folder, max_epochs=5)
    trainer.fit(module, datamodule=tiny_data(squares))
    return module, trainer


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_fit_has_the_results_of_compare(tmp_path, clip_folder, squares, baselines, name):
    module, trainer = fitted(tmp_path, clip_folder, squares, **SYSTEMS[name])
    assert trainer.callback_metrics["val/mAP"] == pytest.approx(baselines[name], abs=1e-6)
    assert trainer.current_epoch == 1  # one step, regardless of the limits
    file = tmp_path / "system.ckpt"
    trainer.save_checkpoint(file)
    classifier = Classifier.load(file, network=functools.partial(ZeroShotCLIP, clip=str(clip_folder)))
    images = torch.cat([batch.images for batch in trainer.datamodule.val_dataloader()])
    torch.testing.assert_close(classifier.scores(images), module(images))
    torch.testing.assert_close(classifier.thresholds, module.decision_thresholds())


def test_a_stack_without_network_ignores_the_network(tmp_path, clip_folder, squares):
    module, trainer = fitted(tmp_path, clip_folder, squares, **SYSTEMS["stacked probes"])
    features = module.network.features(next(iter(trainer.datamodule.val_dataloader())).images)
    stack = module.fusion.stack_logits(module.network.describer()(features))
    offset, slope = module.fusion.calibration[:2]
    bounded = stack / (1 + (stack / module.fusion.bound) ** 2).sqrt()
    torch.testing.assert_close(module.final_logits(features), offset + slope.exp() * bounded)


def test_nothing_is_trained(tmp_path, clip_folder, squares):
    before = ZeroShotCLIP(Squares.class_names, clip=str(clip_folder)).state_dict()
    module, _ = fitted(tmp_path, clip_folder, squares, **SYSTEMS["zero-shot"])
    for name, value in module.network.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name].numpy())


def test_several_processes_are_refused(clip_folder):
    network = functools.partial(ZeroShotCLIP, clip=str(clip_folder))
    module = SSMLLModule(Squares.class_names, network, labeler=LabeledOnly())
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(ConfigError, match=r"ZeroShotCLIP has nothing to train\. Use one process"):
        TrainingChecks().setup(trainer, module, "fit")


def test_no_strong_views_are_cached_without_training(tmp_path, clip_folder, squares):
    network = functools.partial(ZeroShotCLIP, clip=str(clip_folder))
    module = SSMLLModule(Squares.class_names, network, labeler=StackedProbes(), stack_share=1.0)
    data = tiny_data(squares, feature_cache=FeatureCache(str(tmp_path / "cache"), strong_views=3))
    tiny_trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    (index,) = tmp_path.rglob("index.bin")
    views = 2 * len(data.split.unlabeled) + len(data.split.labeled) + len(data.eval_table())
    assert index.stat().st_size == 36 * views  # 36 bytes per key
