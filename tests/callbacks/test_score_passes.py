"""How often a run scores the unlabeled images, and to which weights the thresholds in its checkpoints belong."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cbsa_lightning.callbacks.thresholds import UpdateThresholds
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.method.labelers import ClassDistributionAware
from cbsa_lightning.method.stacking import StackedProbes
from tiny_data import Squares, tiny_fit


@pytest.fixture
def passes(monkeypatch):
    """Records the epochs in which scores are computed."""
    epochs, original = [], UpdateThresholds._score

    def counted(self, trainer, pl_module, data, rows, epoch):
        epochs.append(epoch)
        return original(self, trainer, pl_module, data, rows, epoch)

    monkeypatch.setattr(UpdateThresholds, "_score", counted)
    return epochs


def fit(folder, clip_folder, squares_folder, every, saves=None, **module):
    source = Squares(squares_folder, train=40)
    trainer = {"check_val_every_n_epoch": every}
    if saves is not None:
        trainer |= {"callbacks": [saves], "enable_checkpointing": True}
    return tiny_fit(folder, clip_folder, source, max_epochs=6, trainer=trainer, **module)


@pytest.mark.parametrize(
    ("labeler", "contexts", "every", "expected"),
    [
        (StackedProbes(), 0, 3, [1, 3, 6]),  # validations after epochs 2 and 5
        (StackedProbes(), 0, 4, [1, 4, 6]),  # after epochs 3 and 5, the last one
        (StackedProbes(), 2, 3, [1, 2, 3, 4, 5, 6]),  # contexts depend on the scores
        (ClassDistributionAware(), 0, 3, [1, 2, 3, 4, 5, 6]),  # the labels also depend on the scores
    ],
)
def test_scores_are_computed_only_in_epochs_that_use_them(
    tmp_path, clip_folder, squares_folder, passes, labeler, contexts, every, expected
):
    module, _ = fit(tmp_path, clip_folder, squares_folder, every, labeler=labeler, num_contexts=contexts)
    assert passes == expected
    assert not module.cut.isnan().any()


def test_training_on_fixed_labels_does_not_depend_on_scoring(tmp_path, clip_folder, squares_folder):
    often, rarely = (
        fit(tmp_path, clip_folder, squares_folder, every, labeler=StackedProbes(), stack_share=0.5, num_contexts=0)[0]
        for every in (1, 5)
    )
    for (name, one), other in zip(often.state_dict().items(), rarely.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    assert torch.equal(often.expected, rarely.expected)


def test_checkpoints_contain_the_thresholds_of_their_weights(tmp_path, clip_folder, squares_folder):
    settings = {"labeler": StackedProbes(), "stack_share": 0.5, "num_contexts": 0}
    saves = ModelCheckpoint(tmp_path / "rarely", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, clip_folder, squares_folder, 3, saves, **settings)
    validated = ModelCheckpoint(tmp_path / "often", "{epoch}", save_top_k=-1)
    fit(tmp_path, clip_folder, squares_folder, 1, validated, **settings)
    for epoch in range(1, 6):
        one, other = (
            read_checkpoint(tmp_path / name / f"epoch={epoch}.ckpt")["state_dict"] for name in ("rarely", "often")
        )
        assert torch.equal(one["cut"], other["cut"])
