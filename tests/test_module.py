"""The training loop: its loss, its stages, and what may and may not change the weights."""

from __future__ import annotations

import inspect
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.labelers import LabeledOnly
from cbsa_lightning.training.module import SSMLLModule
from cbsa_lightning.training.nonfinite_steps import NonFiniteSteps
from reference.losses import asymmetric, cross_entropy
from tiny_clip import tiny_clip
from tiny_data import CLASSES, SIZE, Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer

WARMUP, EPOCHS = 2, 4


class Spy(L.Callback):
    """Records values of each step and epoch."""

    def __init__(self):
        self.rates, self.labeled, self.sizes, self.weights, self.ema, self.metrics = [], [], [], [], [], []
        self.fresh, self.optimizers, self.started = [], [], []
        self.evaluated = Counter()  # calls of the network per validated epoch

    def on_fit_start(self, trainer, module):
        def count(*_):
            self.evaluated[module.current_epoch] += trainer.validating

        module.network.register_forward_hook(count)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        self.rates.append([module.current_epoch, *(group["lr"] for group in optimizer.param_groups)])
        self.labeled.append(int(batch.labeled.sum()))
        self.sizes.append(len(batch.images))
        if batch_idx == 0:
            self.fresh.append(not optimizer.state)
            self.optimizers.append(optimizer)
            self.started.append(bool(module.ema.started))
            self.before = module.network.log_scale.detach().clone()
            self.weights.append([self.before])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights[-1].append(module.network.log_scale.detach().clone())

    def on_train_epoch_end(self, trainer, module):
        with module.ema.applied_to(module.network):
            self.ema.append(module.network.log_scale.detach().clone())
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip_folder, squares):
    """Trains a run of 2 + 2 epochs; also returns the frozen state before training."""
    spy = Spy()
    before = {k: v.clone() for k, v in nn.Module.state_dict(tiny_module(clip_folder).network.clip).items()}
    module, trainer = tiny_fit(
        tmp_path_factory.mktemp("run"),
        clip_folder,
        squares,
        max_epochs=EPOCHS,
        trainer={"callbacks": [spy]},
        data={"warmup_batch_size": 4},
        warmup_epochs=WARMUP,
    )
    return module, trainer, spy, before


def test_the_loss_equals_the_equations_of_the_paper(tmp_path, clip_folder, monkeypatch):
    module = tiny_module(
        clip_folder, num_contexts=3, unsup_weight=0.7, contexts=ContextTask(weight=0.3), decoder_dropout=0.0
    )
    module.trainer = tiny_trainer(tmp_path)
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **kwargs: logged.update(values))
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.manual_seed(0))
    labels = torch.tensor([[1, 0, 0, 1, -1], [0, 0, 1, 0, 0]] + [[-1] * 5] * 3, dtype=torch.int8)
    labeled = torch.tensor([True, True, False, False, False])
    rows = torch.tensor([4, 0, 2, 7, 6])
    table = torch.full((9, 5), -1, dtype=torch.int8)
    table[2] = torch.tensor([1, 0, -1, 0, 0])
    table[6] = torch.tensor([0, 0, 0, 1, 1])
    table[4] = torch.tensor([0, 1, 1, 0, 1])  # a labeled image: only its unknown label is replaced
    contexts = torch.zeros(9, 3)
    contexts[4, 1] = contexts[2, 0] = 1.0
    contexts[0] = torch.tensor([0.5, 0.0, 0.5])
    module.pseudo_labels, module.context_targets = table, contexts

    loss = module.training_step(TrainBatch(images, labels, rows, labeled), 0)
    with torch.no_grad():
        output = module.network(module.network.features(images))
    targets = [[1, 0, 0, 1, 1], labels[1].tolist(), table[2].tolist(), [-1] * 5, table[6].tolist()]
    each = asymmetric(output.logits.double().numpy(), np.array(targets), 0.0, 4.0, 0.05)[0]
    aux = cross_entropy(output.context_logits.double().numpy(), contexts[rows].double().numpy())
    sup = (each[:2].sum() - each[0, 4]) / 5
    unsup = (each[2:].sum() + each[0, 4]) / 5
    assert min(sup, unsup, aux[0], aux[1], aux[2]) > 0
    assert aux[3] == aux[4] == 0
    expected = {"loss_sup": sup, "loss_unsup": unsup, "loss_aux": aux.sum() / 5}
    expected["loss"] = sup + 0.7 * unsup + 0.3 * aux.sum() / 5
    assert {name: float(value) for name, value in logged.items()} == {
        f"train/{name}": pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-4)
    assert loss.requires_grad


def test_the_warm_up_uses_only_labels(tmp_path, clip_folder, monkeypatch):
    module = tiny_module(clip_folder)
    module.trainer = tiny_trainer(tmp_path)
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **kwargs: logged.update(values))
    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    targets = torch.tensor([[1, 0, 0, 0, 1], [-1] * 5], dtype=torch.int8)
    module.training_step(TrainBatch(images, targets, torch.tensor([0, 1]), torch.tensor([True, False])), 0)
    assert float(logged["train/loss_unsup"]) == 0
    assert float(logged["train/loss_sup"]) == float(logged["train/loss"]) > 0
    assert "train/loss_aux" not in logged


def test_each_stage_has_a_schedule_of_its_length(run):
    spy = run[2]
    for epochs in (range(WARMUP), range(WARMUP, EPOCHS)):
        stage = np.array([row[1:] for row in spy.rates if row[0] in epochs])
        assert len(stage) >= 4
        np.testing.assert_allclose(stage[0], [1e-3 / 25, 3e-4 / 25])
        np.testing.assert_allclose(stage[-1], [1e-3 / 25e4, 3e-4 / 25e4])
        assert stage[:, 0].max() == pytest.approx(1e-3)
    assert spy.fresh == [True, False, True, False]
    assert spy.optimizers[0] is spy.optimizers[1] is not spy.optimizers[2]


def test_batches_of_each_stage(run):
    spy = run[2]
    # Warm-up: 8 labeled images of 22 in batches of 4. Second stage: 4 labeled images in batches of 8 (1.25 * 0.4 * 8),
    # and 14 unlabeled images in 4 batches.
    assert spy.sizes == [4] * 4 + [8, 8, 8, 6] * 2
    assert spy.labeled == [4] * 12


def test_average_starts_when_the_warm_up_ends_and_has_its_closed_form(run):
    spy, decay = run[2], 0.8
    assert spy.started == [False, False, True, True]
    second = [w.double() for w in spy.weights[2] + spy.weights[3][1:]]
    steps = len(second) - 1
    assert steps == 8
    expected = decay**steps * second[0] + sum(
        (1 - decay) * decay ** (steps - i) * second[i] for i in range(1, steps + 1)
    )
    torch.testing.assert_close(spy.ema[3].double(), expected, atol=1e-7, rtol=1e-6)
    assert spy.ema[3] != second[-1]


def test_averaged_and_raw_weights_are_equal_during_the_warm_up(run):
    spy = run[2]
    for metrics in spy.metrics[:WARMUP]:
        assert metrics["val/mAP"] == metrics["val/mAP_raw"]
    batches = sum(run[1].num_val_batches)
    assert [spy.evaluated[epoch] for epoch in range(WARMUP)] == WARMUP * [batches]  # evaluated once
    module = run[0]
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    features = module.network.features(images)
    assert not torch.equal(module.eval().score(features).logits, module.score(features, "raw").logits)


def test_logged_names(run):
    first, last = run[2].metrics[0], run[2].metrics[-1]
    always = {"val/mAP", "val/mAP_raw", "val/CF1", "val/OF1", *(f"val/AP/{name}" for name in CLASSES)}
    always |= {"train/loss", "train/loss_sup", "train/loss_unsup", "train/loss_aux"}
    later = {f"pseudo/{name}" for name in ("precision", "recall", "CF1", "coverage")} | {"context/accuracy"}
    assert always <= first.keys()
    assert always | later <= last.keys()
    assert not later & first.keys()
    assert last["train/loss"] == pytest.approx(
        last["train/loss_sup"] + last["train/loss_unsup"] + last["train/loss_aux"], rel=1e-5
    )
    assert run[1].callback_metrics["time/ms_per_image"] > 0


def test_frozen_parameters_do_not_change(run):
    module, _, _, before = run
    after = nn.Module.state_dict(module.network.clip)
    pool = {key for key in before if key.startswith("pool.")}
    assert not any("running_mean" in key for key in before), "folded away"
    assert differences({k: before[k] for k in before.keys() - pool}, after) == []
    assert differences({k: before[k] for k in pool}, after), "the pool did not train"


def test_batch_norm_statistics_do_not_change(tmp_path, squares, monkeypatch):
    monkeypatch.setattr(FrozenCLIP, "speed_up", lambda self: None)  # as for a tower whose batch norms cannot be folded
    clip = tiny_clip(tmp_path / "clip", "timm")
    before = {k: v.clone() for k, v in nn.Module.state_dict(tiny_module(clip).network.clip.tower).items()}
    assert any("running_mean" in key for key in before)
    module, _ = tiny_fit(tmp_path, clip, squares, warmup_epochs=0, max_epochs=1, data={"image_size": 160})
    assert differences(before, nn.Module.state_dict(module.network.clip.tower)) == []
    assert differences(tiny_module(clip).state_dict(), module.state_dict()), "nothing was trained"


class HostReads(TorchDispatchMode):
    """Records operations that make the host wait for a result, or its shape, from the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        masks = [i for i in (args[1] if name == "index" else ()) if i is not None and i.dtype == torch.bool]
        if masks or any(part in name for part in self.WAITS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Observes each step of the second stage from its batch to the next, including Lightning's code."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.stage == "semi-supervised":
            self.steps.append(HostReads())
            self.steps[-1].__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.stage == "semi-supervised":
            self.steps[-1].__exit__(None, None, None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_synchronizes_only_to_check_that_the_loss_is_finite(tmp_path, clip_folder, squares, precision):
    watch = Watch()
    tiny_fit(tmp_path, clip_folder, squares, trainer={"callbacks": [watch], "precision": precision})
    assert len(watch.steps) >= 2
    assert min(step.calls for step in watch.steps) > 300, "nothing was watched"
    assert [step.found for step in watch.steps] == [["_local_scalar_dense"] for _ in watch.steps]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_step_on_a_gpu_has_no_other_synchronization(tmp_path, clip_folder, squares, precision, monkeypatch):
    asked = NonFiniteSteps.is_finite

    def allowed(*args):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        finite = asked(*args)
        torch.cuda.set_sync_debug_mode(mode)
        return finite

    monkeypatch.setattr(NonFiniteSteps, "is_finite", allowed)

    class Forbid(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")  # the first step may allocate

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    settings = {"accelerator": "gpu", "devices": 1, "precision": precision, "callbacks": [Forbid()]}
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, trainer=settings)
    assert trainer.global_step > 2


def test_the_fused_optimizer_equals_the_plain_one():
    found = []
    default = inspect.signature(SSMLLModule).parameters["optimizer"].default
    for make in (default, lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-4)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(50, 7))
        optimizer = make([weight])
        for _ in range(5):
            weight.grad = torch.randn(50, 7)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_state_of_an_epoch_is_stored_in_buffers(run):
    state = run[0].state_dict()
    assert state["tau_pos"].isfinite().any()
    assert set(state["context_partition"].tolist()) == {0, 1}
    labels = tiny_data(Squares(run[0].trainer.datamodule.source.train().root))
    labels.setup("fit")
    np.testing.assert_allclose(
        state["positive_rate"].numpy(), (labels.labeled_targets() == 1).double().mean(0).numpy(), rtol=1e-6
    )


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, clip_folder, squares):
    """Trains one epoch of warm-up and one of the second stage, without contexts."""
    return tiny_fit(tmp_path_factory.mktemp("plain"), clip_folder, squares, num_contexts=0)


def test_a_single_context_equals_no_contexts(tmp_path, clip_folder, squares, plain_run):
    one, _ = tiny_fit(tmp_path, clip_folder, squares, num_contexts=1)
    without = plain_run[0].state_dict()
    assert without.keys() < one.state_dict().keys()
    assert without.pop("context_partition").tolist() == [-1] * 5
    assert differences(without, one.state_dict()) == []
    assert differences(without, tiny_module(clip_folder).state_dict()), "nothing was trained"


def test_training_does_not_use_hidden_labels(tmp_path, clip_folder, squares, squares_folder, plain_run):
    data = plain_run[1].datamodule
    lying = Squares(squares_folder, hidden=data.split.unlabeled)
    changed = (lying.train().labels != squares.train().labels).any(1)
    assert changed.sum() == len(data.split.unlabeled) == 14
    contexts, _ = tiny_fit(tmp_path, clip_folder, squares, num_contexts=2)
    other, trainer = tiny_fit(tmp_path, clip_folder, lying, num_contexts=2)
    assert differences(contexts.state_dict(), other.state_dict()) == []
    assert trainer.callback_metrics["pseudo/recall"] != plain_run[1].callback_metrics["pseudo/recall"]


def test_results_do_not_depend_on_the_number_of_workers(tmp_path, clip_folder, squares, plain_run):
    module, _ = tiny_fit(tmp_path, clip_folder, squares, num_contexts=0, data={"num_workers": 2})
    assert differences(plain_run[0].state_dict(), module.state_dict()) == []


def test_labeled_only_training_has_the_same_number_of_steps(tmp_path, clip_folder, squares, plain_run):
    spy = Spy()
    _, trainer = tiny_fit(
        tmp_path, clip_folder, squares, num_contexts=0, labeler=LabeledOnly(), trainer={"callbacks": [spy]}
    )
    assert trainer.global_step == plain_run[1].global_step == 5
    assert spy.labeled == spy.sizes
    assert spy.fresh == [True, True]
    assert "pseudo/precision" not in trainer.callback_metrics


def test_labeled_only_training_needs_no_unlabeled_images(tmp_path, clip_folder, squares):
    _, trainer = tiny_fit(
        tmp_path,
        clip_folder,
        squares,
        num_contexts=0,
        labeler=LabeledOnly(),
        data={"labeled_fraction": 1.0},
        trainer={"limit_train_batches": 1},
    )
    assert trainer.global_step == 2


def test_predictions_use_averaged_weights_and_stored_thresholds(run):
    module, _, _, _ = run
    module.eval()
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    scores = module(images)
    with torch.no_grad(), module.ema.applied_to(module.network):
        expected = module.network(module.network.features(images)).logits.sigmoid()
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad
    cut = torch.where(module.cut.isnan(), 0.5, module.cut)
    assert torch.equal(module.decision_thresholds(), cut)
    assert tiny_module(module.hparams.clip).decision_thresholds().tolist() == [0.5] * len(CLASSES)


def test_text_is_encoded_again_after_a_pass(tmp_path, clip_folder, squares):
    module, data = tiny_module(clip_folder), tiny_data(squares, predict=str(squares.train().root / "test"))
    trainer = tiny_trainer(tmp_path)
    trainer.predict(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.test(module, datamodule=data, verbose=False)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    before = module.eval()(images)
    with torch.no_grad():
        module.network.target_prompts.words.normal_()
    assert (module(images) - before).abs().max() > 1e-4


def test_more_contexts_than_classes_are_refused(clip_folder):
    with pytest.raises(ConfigError, match="6 contexts cannot be formed from 5 classes"):
        tiny_module(clip_folder, num_contexts=6)
