"""Common ways of training that failed in earlier versions, some of them after hours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from cbsa_lightning import CBSAModule
from cbsa_lightning.__main__ import main
from cbsa_lightning.callbacks import baselines
from cbsa_lightning.callbacks.limits import _tell_result
from cbsa_lightning.callbacks.report import RunReport
from cbsa_lightning.checkpoints.files import read_checkpoint
from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.method.stacking import StackedProbes
from cbsa_lightning.training.gain import GainCheck
from tiny_data import Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer
from zero_shot import zero_shot_mAP


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


class OneColor(Squares):
    """The squares with only their first class."""

    class_names = prompt_names = Squares.class_names[:1]

    def _first(self, table):
        return AnnotationTable(table.root, table.paths, table.labels[:, :1].copy(), self.class_names)

    def train(self):
        return self._first(super().train())

    def test(self):
        return self._first(super().test())


def reported(folder):
    """Returns arguments of a Trainer that writes a report to ``folder``."""
    return {"logger": CSVLogger(folder, name="run", version=0), "callbacks": [RunReport(num_images=2)]}


def test_one_class_is_trained_validated_and_reported(tmp_path, clip_folder, squares_folder):
    module = CBSAModule(["red"], clip=str(clip_folder), num_contexts=0, warmup_epochs=1, prompt_length=2)
    trainer = tiny_trainer(tmp_path, 2, **reported(tmp_path))
    trainer.fit(module, datamodule=tiny_data(OneColor(squares_folder)))
    assert trainer.callback_metrics["val/AP/red"] == trainer.callback_metrics["val/mAP"] > 0
    assert (tmp_path / "run/version_0/predictions.csv").read_text().startswith('"image","labels","red"')


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused_at_the_start(tmp_path, clip_folder, squares, precision):
    with pytest.raises(ConfigError, match="too coarse"):
        tiny_fit(tmp_path, clip_folder, squares, trainer={"precision": precision})


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions_are_reported(tmp_path, clip_folder, squares, precision):
    tiny_fit(tmp_path, clip_folder, squares, trainer={"precision": precision, **reported(tmp_path)})
    assert (tmp_path / "run/version_0/predictions.csv").exists()


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def test_double_precision_can_be_the_default(tmp_path, clip_folder, squares, default_dtype):
    default_dtype(torch.float64)
    module, trainer = tiny_fit(tmp_path, clip_folder, squares, trainer=reported(tmp_path))
    assert trainer.current_epoch == trainer.max_epochs
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert (tmp_path / "run/version_0/predictions.csv").exists()


def test_a_default_of_half_precision_is_refused_at_the_start(tmp_path, clip_folder, squares, default_dtype):
    default_dtype(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"Trained weights are torch\.bfloat16, which is too coarse"):
        tiny_fit(tmp_path, clip_folder, squares)


def test_a_default_device_without_values_is_refused(clip_folder):
    with torch.device("meta"), pytest.raises(ConfigError, match="default device is 'meta'"):
        tiny_module(clip_folder)


CALLBACKS = {  # callbacks of Lightning and their required arguments
    "Timer": {"duration": "00:01:00:00"},
    "LearningRateMonitor": {},
    "EarlyStopping": {"monitor": "val/mAP"},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "OnExceptionCheckpoint": {"dirpath": "stopped"},
    "ModelCheckpoint": {"train_time_interval": "0:10:00"},
    "ModelSummary": {},
    "DeviceStatsMonitor": {},
    "LambdaCallback": {},
    "RichProgressBar": {},
}


def test_callbacks_in_a_saved_configuration_can_be_loaded(tmp_path, capsys):
    saved = tmp_path / "config.yaml"
    callbacks = [{"class_path": f"lightning.pytorch.callbacks.{k}", "init_args": v} for k, v in CALLBACKS.items()]
    saved.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            main(["fit", "--config", "quickstart.yaml", "--config", str(saved), "--print_config"])
        printed.append(capsys.readouterr().out)
        saved.write_text(printed[-1])
    assert printed[0] == printed[1]
    read = yaml.safe_load(printed[0])["trainer"]["callbacks"]
    assert [callback["class_path"].split(".")[-1] for callback in read] == list(CALLBACKS)


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


def test_a_compiled_network_equals_a_plain_one_and_shares_its_checkpoints(tmp_path, clip_folder, squares):
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


class Exclusive(Squares):
    """The squares as two classes that never occur together: warm and cold colors."""

    class_names = prompt_names = ("warm", "cold")

    def _two(self, table):
        warm = (table.labels[:, [0, 3]] == 1).any(1)
        labels = np.stack([warm, ~warm], axis=1).astype(np.int8)
        return AnnotationTable(table.root, table.paths, labels, self.class_names)

    def train(self):
        return self._two(super().train())

    def test(self):
        return self._two(super().test())


def test_impossible_contexts_are_disabled_with_a_warning(tmp_path, clip_folder, squares_folder):
    settings = {"num_contexts": 2, "warmup_epochs": 1, "prompt_length": 2, "decoder_layers": 1, "ema_decay": 0.8}

    def fit(epochs, **limits):
        torch.manual_seed(0)
        module = CBSAModule(Exclusive.class_names, clip=str(clip_folder), **settings)
        trainer = tiny_trainer(tmp_path, epochs, **limits)
        return module, trainer, tiny_data(Exclusive(squares_folder))

    module, trainer, data = fit(3)
    with pytest.warns(UserWarning, match=r"without contexts, since its 8 labeled images.*only 0 of 2 classes"):
        trainer.fit(module, datamodule=data)
    assert (module.context_partition == -1).all()
    assert trainer.callback_metrics["train/loss_aux"] == 0
    assert "context/accuracy" not in trainer.callback_metrics
    last = tmp_path / "last.ckpt"
    shorter, stopped, data = fit(3, max_steps=5)
    stopped.fit(shorter, datamodule=data)
    stopped.save_checkpoint(last)
    resumed, again, data = fit(3)
    again.fit(resumed, datamodule=data, ckpt_path=last)
    assert differences(module.state_dict(), resumed.state_dict()) == []


def test_a_gain_check_on_half_of_the_labels_needs_no_contexts(tmp_path, clip_folder, squares_folder):
    module = CBSAModule(Exclusive.class_names, clip=str(clip_folder), num_contexts=2, prompt_length=2, warmup_epochs=1)
    settings = {"max_epochs": 2, "accelerator": "cpu", "use_distributed_sampler": False}
    with pytest.warns(UserWarning, match="without contexts"):
        gain = GainCheck(folds=2)(module, tiny_data(Exclusive(squares_folder), labeled_fraction=0.6), settings)
    assert np.isfinite(gain.overall).all()


def messages(caught):
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": 9, "trainer": {"max_steps": 2}}])
def test_unused_unlabeled_images_are_reported_at_the_start(tmp_path, clip_folder, squares, limit):
    with pytest.warns(UserWarning, match="warm-up") as caught:
        tiny_fit(tmp_path, clip_folder, squares, **limit, warmup_epochs=3)
    told = [text for text in messages(caught) if "unlabeled images" in text]
    assert len(told) == 1
    assert "(model.warmup_epochs is 3), so the 14 unlabeled images are never used" in told[0]


def test_a_run_that_stops_in_the_warm_up_reports_it_at_the_end(tmp_path, clip_folder, squares):
    stopped = {"max_time": {"seconds": 0}, "min_steps": 1}
    with pytest.warns(UserWarning, match="within the warm-up .*so the 14 unlabeled images were not used"):
        tiny_fit(tmp_path, clip_folder, squares, max_epochs=9, warmup_epochs=3, trainer=stopped)


def test_nothing_is_reported_if_unlabeled_images_are_used_or_not_wanted(tmp_path, clip_folder, squares):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_fit(tmp_path, clip_folder, squares)
        tiny_fit(tmp_path, clip_folder, squares, warmup_epochs=2, labeler=LabeledOnly())
    assert not [text for text in messages(caught) if "unlabeled images" in text]


def test_few_validation_images_are_reported(tmp_path, clip_folder, squares):
    with pytest.warns(UserWarning, match="measured on 7 images, with positives of 5 of 5 classes"):
        tiny_fit(tmp_path, clip_folder, squares)


class NoBetter(CBSAModule):
    """A module whose validation reports a fixed mAP."""

    found = 0.0

    def _log_report(self, prefix, report):
        super()._log_report(prefix, {**report, "mAP": torch.tensor(self.found)})


def test_a_final_map_no_better_than_zero_shot_is_reported(tmp_path, clip_folder, squares, caplog, monkeypatch):
    caplog.set_level("INFO")
    data = tiny_data(squares)
    data.setup("fit")
    zero_shot = zero_shot_mAP(FrozenCLIP.load(str(clip_folder)), data)
    measured, compute = [], baselines._mAP
    # The ranks of seven images with random towers depend on rounding, so the metric is fixed.
    monkeypatch.setattr(baselines, "_mAP", lambda *args: measured.append(compute(*args)) or zero_shot)
    for found, expected in ((zero_shot - 1e-4, 1), (zero_shot + 1e-4, 0)):
        module = NoBetter(Squares.class_names, clip=str(clip_folder), num_contexts=0, warmup_epochs=1, prompt_length=2)
        module.found = found
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_trainer(tmp_path, 1).fit(module, datamodule=data)
        told = [text for text in messages(caught) if "Training did not help" in text]
        assert len(told) == expected, found
        assert f"on 7 images; zero-shot CLIP has {100 * zero_shot:.1f} %." in [*told, caplog.text][0]
    assert measured == pytest.approx([zero_shot] * 2, abs=0.05)


@pytest.mark.parametrize("better", [True, False])
def test_a_probe_with_the_same_result_is_reported(tmp_path, clip_folder, squares, caplog, better):
    caplog.set_level("INFO")
    module = NoBetter(
        Squares.class_names, clip=str(clip_folder), num_contexts=0, warmup_epochs=1, prompt_length=2,
        labeler=StackedProbes(),
    )  # fmt: skip
    module.found = 1.0 if better else 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer(tmp_path, 2)
        trainer.fit(module, datamodule=tiny_data(squares))
    (measured,) = (c for c in trainer.callbacks if isinstance(c, baselines.MeasureBaselines))
    zero, linear, stack = (
        f"{100 * measured.results[n]:.1f} %" for n in ("zero-shot", "linear probe", "stacked probes")
    )
    figures = f"on 7 images; zero-shot CLIP has {zero}, a linear probe {linear}, stacked probes {stack}."
    told = [text for text in messages(caught) if "This model is not better than" in text or "did not help" in text]
    assert len(told) == (not better)
    assert figures in [*told, caplog.text][0]


def test_a_fit_reports_its_data(tmp_path, clip_folder, squares, caplog):
    caplog.set_level("INFO")
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, trainer={"limit_val_batches": 0, "max_steps": 1})
    positives = (trainer.datamodule.labeled_targets() == 1).sum(0).tolist()
    counts = sorted(zip(positives, range(5), strict=True))
    classes = ", ".join(f"{Squares.class_names[k]} {n}" for n, k in counts)
    assert "Training images: 8 labeled, 14 unlabeled, 0 held out. " in caplog.text
    assert f"Labeled positives of 5 classes, fewest first: {classes}." in caplog.text


@pytest.mark.parametrize(("found", "told"), [(1.0, 0), (0.9, 1)])
def test_a_perfect_result_is_not_reported(recwarn, found, told):
    _tell_result(found, 2, {"zero-shot": 1.0 if found == 1 else 0.9}, trains=True)
    assert len([text for text in messages(recwarn) if "Training did not help" in text]) == told
