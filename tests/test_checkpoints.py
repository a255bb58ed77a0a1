"""Lean checkpoints: content, errors on loading, and resuming."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cbsa_lightning import CBSAModule
from cbsa_lightning.errors import CheckpointError
from cbsa_lightning.inference.classifier import Classifier
from tiny_clip import tiny_clip
from tiny_data import CLASSES, SIZE, Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer

WARMUP, EPOCHS = 2, 4


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


@pytest.fixture(scope="module", params=["after validation", "at the epoch's end"])
def run(request, tmp_path_factory, clip_folder, squares):
    """A run of 2 + 2 epochs with a checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("run")
    at_end = request.param == "at the epoch's end"
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_end)
    settings = {"callbacks": [saver], "enable_checkpointing": True}
    module, _ = tiny_fit(folder, clip_folder, squares, max_epochs=EPOCHS, trainer=settings, warmup_epochs=WARMUP)
    return module, [folder / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS)]


def scores(module):
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.manual_seed(0))
    return module.eval()(images)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_resumed_after_an_epoch_is_bit_identical(tmp_path, clip_folder, squares, run, epoch):
    """Covers dropout and the change of stages: epoch 1 is the last epoch of the warm-up."""
    module, files = run
    resumed, trainer = tiny_fit(
        tmp_path, clip_folder, squares, max_epochs=EPOCHS, warmup_epochs=WARMUP, ckpt_path=str(files[epoch])
    )
    assert trainer.current_epoch == EPOCHS
    assert differences(module.state_dict(), resumed.state_dict()) == []
    assert torch.equal(module.pseudo_labels, resumed.pseudo_labels)
    assert torch.equal(module.context_targets, resumed.context_targets)


def test_content_of_a_checkpoint(run):
    module, files = run
    checkpoint = torch.load(files[-1], weights_only=True)
    keys = set(checkpoint["state_dict"])
    assert not [key for key in keys if key.startswith(("network.clip.tower.", "network.clip.text."))]
    assert not {"network.clip.mean", "network.clip.std"} & keys
    assert {key for key in keys if key.startswith("network.clip.")} == {
        f"network.clip.pool.{name}" for name, _ in module.network.clip.pool.named_parameters()
    }
    assert {"network.target_prompts.words", "ema.started", "tau_pos", "context_partition"} <= keys
    assert checkpoint["class_names"] == list(CLASSES)
    assert checkpoint["frozen_fingerprint"] == module.network.clip.fingerprint
    assert differences(checkpoint["state_dict"], module.state_dict()) == []


def test_a_checkpoint_loads_without_arguments(run):
    module, files = run
    loaded = CBSAModule.load_from_checkpoint(files[-1])
    assert loaded.class_names == list(CLASSES)
    assert torch.equal(scores(loaded), scores(module))
    assert torch.equal(loaded.decision_thresholds(), module.decision_thresholds())


def test_other_classes_are_refused(tmp_path, clip_folder, run):
    checkpoint = torch.load(run[1][-1], weights_only=True)
    checkpoint["hyper_parameters"]["class_names"] = ["red", "green", "blue", "yellow", "violet"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"red, green, blue, yellow, cyan; this module has .*violet"):
        CBSAModule.load_from_checkpoint(tmp_path / "other.ckpt")


def test_other_frozen_weights_are_refused(tmp_path, run):
    ours = run[0].network.clip.fingerprint[:12]
    with pytest.raises(CheckpointError, match=f"other frozen weights .sha256 {ours}"):
        CBSAModule.load_from_checkpoint(run[1][-1], clip=str(tiny_clip(tmp_path, "resnet", seed=7)))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"decoder_feedforward": 24}, r"other shape: .*linear1.weight \(16, 24\) instead of \(24, 24\)"),
        ({"decoder_layers": 2}, r"missing: .*network.decoder.blocks.1"),
        ({"num_contexts": 0}, r"unknown: .*network.context_head"),
        ({"train_pool": False, "num_contexts": 0}, r"unknown: .*average_of_clip__pool"),
    ],
)
def test_errors_name_tensors_of_other_shapes(run, changes, found):
    with pytest.raises(CheckpointError, match=found):
        CBSAModule.load_from_checkpoint(run[1][-1], **changes)


def test_the_label_decoder_of_earlier_checkpoints_is_refused(tmp_path, run):
    checkpoint = torch.load(run[1][-1], weights_only=True)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k.replace("decoder.blocks.", "decoder.layers."): v for k, v in state.items()}
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    with pytest.raises(CheckpointError, match="an earlier label decoder"):
        CBSAModule.load_from_checkpoint(tmp_path / "earlier.ckpt")
    with pytest.raises(CheckpointError, match="an earlier label decoder"):
        Classifier.load(tmp_path / "earlier.ckpt")


def test_a_fit_from_loaded_weights_resets_the_state_of_the_earlier_run(tmp_path, clip_folder, squares_folder, run):
    """With more images and a new warm-up, tables and average are reset, and contexts keep their ids."""
    module = CBSAModule.load_from_checkpoint(run[1][-1])
    assert bool(module.ema.started)
    partition = module.context_partition.clone()
    larger = Squares(squares_folder / "larger", train=30)
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=tiny_data(larger))
    assert not bool(module.ema.started)
    assert float(trainer.callback_metrics["val/mAP"]) == float(trainer.callback_metrics["val/mAP_raw"])
    assert module.pseudo_labels is None
    assert module.context_targets.shape == (30, 2)
    assert torch.equal(module.context_partition, partition)


def test_states_with_frozen_weights_can_be_loaded(clip_folder):
    """A state with frozen weights can also be loaded, and a lean one reports missing weights."""
    module = tiny_module(clip_folder)
    state = torch.nn.Module.state_dict(module)
    assert len(state) > len(module.state_dict())
    module.load_state_dict(state)
    lacking = module.state_dict()
    del lacking["network.log_scale"]
    with pytest.raises(CheckpointError, match=r"missing: .*network\.log_scale"):
        module.load_state_dict(lacking)
