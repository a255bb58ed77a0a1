"""Fusion of network and stack: final scores of validation, predictions and classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from cbsa_lightning import Classifier
from cbsa_lightning.errors import CheckpointError, ConfigError
from cbsa_lightning.method.calibration import fit_calibration
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.method.labelers import Evidence
from cbsa_lightning.method.stacking import StackedProbes
from tiny_data import Squares, differences, tiny_fit, tiny_module, tiny_trainer

FUSED = {"labeler": StackedProbes(), "stack_share": 0.5}


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder, squares):
    folder = tmp_path_factory.mktemp("fused")
    module, trainer = tiny_fit(folder, clip_folder, squares, max_epochs=3, **FUSED)
    trainer.save_checkpoint(folder / "fused.ckpt")
    return module, trainer, folder / "fused.ckpt"


def by_hand(module, clip, data, loader):
    """Computes the fused scores of the images of a loader from the definition, in float64."""
    untrained = tiny_module(clip)  # its pool has CLIP's original weights
    describe = untrained.network.describer()

    def described(batches):
        parts = [[*d.descriptors, *d.scores] for b in batches for d in [describe(untrained.network.features(b.images))]]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    rows = np.concatenate([data.split.labeled, data.split.unlabeled])
    known = described(data.plain_dataloader(rows))
    labels = data.labeled_targets()
    m = len(labels)
    stack = StackedProbes().fit(Evidence(known[:2], known[2:], torch.arange(m), labels))
    beside = stack.logits([part[m:].numpy() for part in known])
    module.eval()
    weak = [module.score(module.network.features(b.images)).logits for b in data.weak_dataloader(3)]
    weak = torch.cat(weak).double().numpy()
    new = list(loader)
    own = torch.cat([module.score(module.network.features(b.images)).logits for b in new]).double().numpy()
    z = (own - weak.mean(0)) / weak.std(0)
    theirs = stack.logits([part.numpy() for part in described(new)])
    averaged = (beside.mean(0) + beside.std(0) * z + theirs) / 2
    bound = np.log(labels.numel() + 2)
    left_out, averaged = (x / np.sqrt(1 + (x / bound) ** 2) for x in (stack.left_out(), averaged))
    mode = fit_calibration(left_out, labels.numpy()).mode
    return mode[:, 0] + np.exp(mode[:, 1]) * averaged


def test_validation_scores_are_the_mean_on_the_scale_of_the_stack(run, clip_folder, squares):
    module, trainer, _ = run
    data = trainer.datamodule
    expected = by_hand(module, clip_folder, data, data.val_dataloader())
    scores = torch.cat([module(b.images) for b in data.val_dataloader()])
    np.testing.assert_allclose(
        torch.logit(scores.double()).numpy(), expected, atol=2e-2
    )  # the regression of the stack stops at 1e-4
    truth = data.eval_table().labels
    assert trainer.callback_metrics["val/mAP"] == pytest.approx(average_precision_score(truth, expected), abs=1e-6)
    plain = torch.cat([module.score(module.network.features(b.images)).logits for b in data.val_dataloader()])
    network = average_precision_score(truth, plain.numpy())
    assert trainer.callback_metrics["val/mAP_network"] == pytest.approx(network, abs=1e-6)


def test_training_does_not_depend_on_the_fusion(run, tmp_path, clip_folder, squares):
    plain, _ = tiny_fit(tmp_path, clip_folder, squares, max_epochs=3, labeler=StackedProbes())
    states = [{k: v for k, v in m.state_dict().items() if k != "cut"} for m in (run[0], plain)]
    assert not differences(*states)


def test_a_checkpoint_gives_the_same_scores_everywhere(run, clip_folder):
    module, trainer, file = run
    data = trainer.datamodule
    images = torch.cat([batch.images for batch in data.val_dataloader()])
    scores = module(images)
    classifier = Classifier.load(file)
    torch.testing.assert_close(classifier.scores(images), scores)
    torch.testing.assert_close(classifier.thresholds, module.decision_thresholds())
    other = tiny_module(clip_folder, **FUSED)
    measured = tiny_trainer(file.parent).validate(other, datamodule=data, ckpt_path=str(file))
    assert measured[0]["val/mAP"] == pytest.approx(float(trainer.callback_metrics["val/mAP"]), abs=1e-6)


def test_a_resumed_run_ends_with_the_same_scores(run, tmp_path, clip_folder, squares):
    module, trainer, _ = run
    settings = {"max_epochs": 3, **FUSED}
    _, stopped = tiny_fit(tmp_path, clip_folder, squares, **settings, trainer={"max_steps": 4})
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, again = tiny_fit(tmp_path, clip_folder, squares, **settings, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert not differences(module.state_dict(), resumed.state_dict())
    assert not differences(module.fusion.tensors(), resumed.fusion.tensors())
    assert again.callback_metrics["val/mAP"] == trainer.callback_metrics["val/mAP"]


def test_decision_thresholds_predict_each_class_at_its_labeled_rate(run):
    module, trainer, _ = run
    data = trainer.datamodule
    rate = (data.labeled_targets() == 1).float().mean(0)
    scores = []
    for batch in data.weak_dataloader(3):
        scores.append(module(batch.images))
    given = (torch.cat(scores) >= module.decision_thresholds() - 2e-3).float().mean(0)
    assert (given - rate).abs().max() < 0.15  # there are 14 images


def test_tensors_of_a_checkpoint_restore_the_fusion(run):
    fusion = run[0].fusion
    again = Fusion.from_tensors(fusion.tensors())
    assert len(again.weights) == len(fusion.weights) == 3
    assert not differences(again.tensors(), fusion.tensors())
    assert again.tensors().keys() == fusion.tensors().keys()


def test_a_class_with_constant_network_scores_uses_the_stack(run):
    fusion = run[0].fusion.adapted(torch.tensor([[1.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 1]]))
    stack = torch.full((2, 5), 3.0)
    averaged = fusion.averaged(torch.rand(2, 5), stack)
    expected = (stack[:, 0] + fusion.stack_mean[0]) / 2
    torch.testing.assert_close(averaged[:, 0], expected / (1 + (expected / fusion.bound) ** 2).sqrt())
    assert averaged.isfinite().all()


@pytest.mark.parametrize("change", [
    lambda stored: "text", lambda stored: {}, lambda stored: {**stored, "slopes": stored["slopes"][:, :3]},
    lambda stored: {**stored, "more": stored["slopes"]}, lambda stored: {**stored, "offset": 3},
    lambda stored: {name: tensor for name, tensor in stored.items() if name != "means.0"},
])  # fmt: skip
def test_a_damaged_fusion_is_refused(run, tmp_path, change):
    checkpoint = torch.load(run[2], weights_only=True)
    checkpoint["fusion"] = change(checkpoint["fusion"])
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match=r"damaged\.ckpt.*fusion"):
        Classifier.load(tmp_path / "damaged.ckpt")


@pytest.mark.parametrize("settings", [{}, {"labeler": None}])
def test_fusion_without_a_stack_is_refused(clip_folder, settings):
    with pytest.raises(ConfigError, match="Set labeler to StackedProbes"):
        tiny_module(clip_folder, stack_share=0.5, **settings)


def test_the_warm_up_is_validated_without_the_stack(tmp_path, clip_folder, squares):
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, max_epochs=1, warmup_epochs=1, **FUSED)
    assert trainer.callback_metrics["val/mAP"] == trainer.callback_metrics["val/mAP_network"]
