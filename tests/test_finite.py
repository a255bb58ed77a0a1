"""NaN and infinite values are detected and named in the step in which they occur; training stops or skips the step."""

from functools import partial

import lightning as L
import pytest
import torch

from cbsa_lightning import SSMLLModule
from cbsa_lightning.errors import NotFiniteError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.method.finite import all_finite, not_finite, refuse_scores, rows_not_finite
from cbsa_lightning.networks.resnet import ImageNetNetwork
from tiny_data import CLASSES, Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


class Poison(L.Callback):
    """Replaces one value of the given steps with NaN or infinity."""

    def __init__(self, where, steps, value=float("nan")):
        self.where, self.steps, self.value = where, steps, value
        self.image = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = {k: v.clone() for k, v in module.state_dict().items()}
        hit = (trainer.current_epoch, batch_idx) in self.steps
        network, plain = module.network, type(module.network).forward
        if not hit:
            return
        if self.where == "features":
            features = module.features_of(batch).clone()
            features[1] = self.value
            module.features_of = lambda batch: features
            self.image = int(batch.index[1])
        elif self.where == "weights":
            with torch.no_grad():
                module.network.log_scale.fill_(self.value)
        else:

            def forward(*args, **kwargs):
                output = plain(network, *args, **kwargs)
                wrong = getattr(output, self.where).clone()
                wrong[2, 0] = self.value
                self.image = int(batch.index[2])
                return output._replace(**{self.where: wrong})

            network.forward = forward

    def on_train_batch_end(self, trainer, module, *_):
        module.__dict__.pop("features_of", None)
        module.network.__dict__.pop("forward", None)


def fit(tmp_path, clip_folder, squares, poison, **settings):
    trainer = {"callbacks": [poison], **settings.pop("trainer", {})}
    return tiny_fit(tmp_path, clip_folder, squares, trainer=trainer, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("where", "named"), [("logits", "logits"), ("context_logits", "context logits"), ("features", "features")]
)
def test_training_stops_before_an_update_and_names_the_tensor(tmp_path, clip_folder, squares, where, named, value):
    poison = Poison(where, {(1, 2)}, value)
    module = tiny_module(clip_folder)
    with pytest.raises(NotFiniteError, match=r"Epoch 1, step 2: not finite: .*of 1 image") as error:
        tiny_trainer(tmp_path, callbacks=[poison]).fit(module, datamodule=tiny_data(squares))
    assert named in str(error.value)
    assert f"train/{poison.image}.png (row {poison.image})" in str(error.value)
    assert differences(poison.before, module.state_dict()) == []


def test_nonfinite_weights_always_stop_training(tmp_path, clip_folder, squares):
    with pytest.raises(NotFiniteError, match=r"the weights log_scale"):
        fit(tmp_path, clip_folder, squares, Poison("weights", {(1, 1)}), max_skipped_steps=9)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_skipped_step_changes_no_weights_and_no_average(tmp_path, clip_folder, squares, precision, accumulate):
    check_a_step_left_out(tmp_path, clip_folder, squares, accumulate, precision=precision)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_a_skipped_step_on_a_gpu(tmp_path, clip_folder, squares, precision):
    check_a_step_left_out(tmp_path, clip_folder, squares, 1, precision=precision, accelerator="gpu", devices=1)


def check_a_step_left_out(tmp_path, clip_folder, squares, accumulate, **settings):
    class Compare(L.Callback):
        def __init__(self):
            self.moved = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            changed = [k for k in differences(poison.before, module.state_dict()) if k.startswith(("network.", "ema."))]
            self.moved.append(((trainer.current_epoch, batch_idx), bool(changed)))

    poison, compare = Poison("logits", {(1, 1), (1, 3)}), Compare()
    settings |= {"callbacks": [poison, compare], "accumulate_grad_batches": accumulate}
    with pytest.warns(UserWarning, match="is skipped"):
        module, trainer = tiny_fit(tmp_path, clip_folder, squares, trainer=settings, max_skipped_steps=1)
    moved = dict(compare.moved)
    assert not moved[(1, 1)]
    assert not moved[(1, 3)]
    # With gradient scaling, the first steps may be skipped until the scale is suitable.
    assert moved[(1, 2)] == (accumulate == 1) or settings.get("precision") == "16-mixed"
    assert trainer.state.finished
    assert not not_finite(module.state_dict() | {k: torch.zeros(1) for k in ("tau_pos", "tau_neg", "cut")})
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_a_skipped_step_changes_no_running_statistics(tmp_path, squares):
    network = partial(ImageNetNetwork, backbone="test_resnet", pretrained="random")
    torch.manual_seed(0)
    module = SSMLLModule(CLASSES, network, warmup_epochs=1, max_skipped_steps=1)
    plain, seen = module.network.forward, []

    def forward(features, *args, **kwargs):
        if module.training and module.trainer.global_step == 1 and not seen:
            seen.append({k: v.clone() for k, v in module.network.named_buffers() if "running" in k})
            features = torch.full_like(features.float(), float("nan"))
            plain(features)  # changes the statistics
            output = plain(features)
            return output
        return plain(features, *args, **kwargs)

    class Compare(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                now = dict(module.network.named_buffers())
                assert all(torch.equal(now[k], v) for k, v in seen[0].items())
                seen.append(True)

    module.network.forward = forward
    with pytest.warns(UserWarning, match="is skipped"):
        tiny_trainer(tmp_path, callbacks=[Compare()]).fit(module, datamodule=tiny_data(squares))
    assert seen[1:] == [True]


def test_a_nonfinite_batch_skips_the_whole_accumulated_step(tmp_path, clip_folder, squares):
    """If the first of two accumulated batches is not finite, the second batch is not used either."""

    class Compare(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 0):
                self.before = {k: v.clone() for k, v in module.state_dict().items()}
            if (trainer.current_epoch, batch_idx) == (1, 1):
                assert differences(self.before, module.state_dict()) == []
                self.compared = True

    poison, compare = Poison("logits", {(1, 0)}), Compare()
    settings = {"callbacks": [poison, compare], "accumulate_grad_batches": 2}
    with pytest.warns(UserWarning, match="is skipped"):
        tiny_fit(tmp_path, clip_folder, squares, trainer=settings, max_skipped_steps=1)
    assert compare.compared


def test_too_many_consecutive_skipped_steps_stop_training(tmp_path, clip_folder, squares):
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(NotFiniteError, match="step 2"):
        fit(tmp_path, clip_folder, squares, Poison("logits", {(1, 0), (1, 1), (1, 2)}), max_skipped_steps=2)


def test_nonfinite_scores_do_not_change_thresholds(tmp_path, clip_folder, squares):
    module, _ = tiny_fit(tmp_path, clip_folder, squares, max_epochs=2)
    before = {name: getattr(module, name).clone() for name in ("tau_pos", "tau_neg", "cut", "context_partition")}
    labels = module.pseudo_labels.clone()
    score = module.score

    def broken(features, weights="ema", **options):
        output = score(features, weights, **options)
        if not module.trainer.validating:
            output.logits[1, 1] = float("nan")
        return output

    module.score = broken
    module.warmup_epochs = 0
    with pytest.raises(NotFiniteError, match=r"Scores of the weak views of \d image\(s\) are not finite: train/"):
        tiny_trainer(tmp_path, max_epochs=3).fit(module, datamodule=tiny_data(squares))
    for name, value in before.items():
        assert torch.equal(value, getattr(module, name)), name
    assert module.pseudo_labels is None or torch.equal(labels, module.pseudo_labels)


def test_errors_in_validation_name_the_image(tmp_path, clip_folder, squares):
    module = tiny_module(clip_folder)
    score = module.score

    def broken(features, weights="ema", **options):
        output = score(features, weights, **options)
        output.logits[3, 0] = float("inf")
        return output

    module.score = broken
    with pytest.raises(NotFiniteError, match=r"Validation scores \(ema\) of 1 image\(s\) are not finite: test/3.png"):
        tiny_trainer(tmp_path, max_epochs=1).fit(module, datamodule=tiny_data(squares))


def test_errors_of_the_classifier_name_the_image(clip_folder, squares):
    network = tiny_module(clip_folder).network
    with torch.no_grad():
        network.log_scale.fill_(float("nan"))
    classifier = Classifier(network, CLASSES, torch.full((len(CLASSES),), 0.5), 64)
    file = str(squares.train().file(4))
    with pytest.raises(NotFiniteError, match=r"train/4.png"):
        classifier([file])


def test_nonfinite_weights_are_not_saved(tmp_path, clip_folder, squares):
    module, trainer = tiny_fit(tmp_path, clip_folder, squares, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    whole = (tmp_path / "run.ckpt").read_bytes()
    with torch.no_grad():
        module.network.log_scale.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"network\.log_scale.*not saved"):
        trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert (tmp_path / "run.ckpt").read_bytes() == whole
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["run.ckpt"]


def test_checks_of_single_tensors():
    good, bad = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [float("inf"), float("-inf")], [0.0, float("nan")]])
    assert bool(all_finite([good, None, torch.tensor(1e30)]))
    assert not bool(all_finite([good, bad]))
    assert rows_not_finite(bad) == [1, 2]
    assert not_finite({"a": good, "b": bad, "c": torch.tensor([1]), "d": torch.empty(0)}) == ["b"]
    refuse_scores(torch.full((4, 9), 3e38), str, "sums that overflow")  # large, but finite
    with pytest.raises(NotFiniteError, match=r"x of 2 image\(s\) are not finite: 1, 2"):
        refuse_scores(bad, str, "x")
