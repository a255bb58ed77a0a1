"""Ways in which people train, each of which once failed, some after hours: tests of kinds of faults."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from cbsa_lightning import CBSAModule
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.checkpoint_files import read_checkpoint
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import ConfigError
from tiny_data import Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


class OneColour(Squares):
    """The squares with their first class alone."""

    class_names = prompt_names = Squares.class_names[:1]

    def _first(self, table):
        return AnnotationTable(table.root, table.paths, table.labels[:, :1].copy(), self.class_names)

    def train(self):
        return self._first(super().train())

    def test(self):
        return self._first(super().test())


def reported(folder):
    """Arguments of a Trainer that leaves a report in ``folder``."""
    return {"logger": CSVLogger(folder, name="run", version=0), "callbacks": [RunReport(num_images=2)]}


def test_one_class_is_trained_validated_and_reported(tmp_path, clip_folder, squares_folder):
    module = CBSAModule(["red"], clip=str(clip_folder), num_contexts=0, warmup_epochs=1, prompt_length=2)
    trainer = tiny_trainer(tmp_path, 2, **reported(tmp_path))
    trainer.fit(module, datamodule=tiny_data(OneColour(squares_folder)))
    assert trainer.callback_metrics["val/AP/red"] == trainer.callback_metrics["val/mAP"] > 0
    assert (tmp_path / "run/version_0/predictions.csv").read_text().startswith('"image","labels","red"')


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused_at_the_start(tmp_path, clip_folder, squares, precision):
    with pytest.raises(ConfigError, match="too coarse"):
        tiny_fit(tmp_path, clip_folder, squares, trainer={"precision": precision})


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "32-true"])
def test_other_precisions_are_reported(tmp_path, clip_folder, squares, precision):
    tiny_fit(tmp_path, clip_folder, squares, trainer={"precision": precision, **reported(tmp_path)})
    assert (tmp_path / "run/version_0/predictions.csv").exists()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_under_mixed_precision(tmp_path, clip_folder, squares, algorithm):
    clipped = []

    class Module(CBSAModule):
        def configure_gradient_clipping(self, optimizer, **settings):
            super().configure_gradient_clipping(optimizer, **settings)
            gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
            clipped.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))

    trainer = tiny_trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    module = Module(Squares.class_names, clip=str(clip_folder), num_contexts=0, warmup_epochs=1, prompt_length=2)
    trainer.fit(module, datamodule=tiny_data(squares))
    assert len(clipped) == trainer.global_step
    assert max(clipped) <= 1.0001e-3


def test_a_compiled_network_trains_like_a_plain_one_and_shares_its_checkpoints(tmp_path, clip_folder, squares):
    plain, _ = tiny_fit(tmp_path, clip_folder, squares)
    module = tiny_module(clip_folder)
    module.network = torch.compile(module.network, backend="eager")
    compiled_trainer = tiny_trainer(tmp_path)
    compiled_trainer.fit(module, datamodule=tiny_data(squares))
    assert differences(plain.state_dict(), module.state_dict()) == []
    assert plain.state_dict().keys() == module.state_dict().keys()
    compiled_trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    state = read_checkpoint(tmp_path / "compiled.ckpt", ("state_dict",))["state_dict"]
    loaded = tiny_module(clip_folder, decoder_feedforward=16)
    loaded.load_state_dict(state)
    module.load_state_dict(plain.state_dict())
    assert differences(loaded.state_dict(), plain.state_dict()) == []
