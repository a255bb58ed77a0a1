"""A run resumes from any checkpoint with bit-identical results; finding runs and checkpoints."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cbsa_lightning import __main__ as cli
from cbsa_lightning.checkpoints.files import SOURCE, TORN, newest_checkpoint, read_checkpoint
from cbsa_lightning.cli import lightning_cli
from cbsa_lightning.cli.resuming import resumed
from cbsa_lightning.errors import CheckpointError, ConfigError, DataError
from cbsa_lightning.io import runs
from cbsa_lightning.training.loggers import MetricsFile, RunLogger, going_on
from tiny_data import Squares, differences, tiny_data, tiny_fit, tiny_module, tiny_trainer


@pytest.fixture(scope="module")
def squares(squares_folder):
    return Squares(squares_folder)


class Record(Logger):
    """Logger that stores all logged metrics, except times."""

    name = version = "record"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {k: float(v) for k, v in metrics.items() if not k.startswith("time/")}))

    def log_hyperparams(self, *args, **kwargs):
        pass


class SaveAlways(Checkpoint):
    """Writes a checkpoint at every point where Lightning's callback may write one."""

    def __init__(self, folder):
        self.folder, self.files = folder, []

    def save(self, trainer, where, logger):
        file = self.folder / f"{len(self.files):02d}-{where}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(file)
        self.files.append((file, len(logger.rows)))

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch", trainer.logger)

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation", trainer.logger)

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch", trainer.logger)


class Steps(L.Callback):
    """Records the images of each step."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, *batch.index.tolist()))


def run(folder, clip, squares, *callbacks, ckpt_path=None, data=None, **settings):
    record, steps = Record(), Steps()
    settings = {"logger": record, "callbacks": [steps, *callbacks], "enable_checkpointing": bool(callbacks), **settings}
    module, trainer = tiny_fit(
        folder, clip, squares, max_epochs=3, trainer=settings, ckpt_path=ckpt_path and str(ckpt_path), data=data
    )
    state = dict(module.state_dict(), pseudo_labels=module.pseudo_labels, context_targets=module.context_targets)
    moments = trainer.optimizers[0].state_dict()["state"]
    state |= {f"optimizer.{i}.{name}": value for i, found in moments.items() for name, value in found.items()}
    return {k: v.clone() for k, v in state.items()}, record.rows, steps.batches


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"val_check_interval": 0.5, "accumulate_grad_batches": 3},
        pytest.param({"val_check_interval": 0.5}, marks=pytest.mark.slow),
        pytest.param({"check_val_every_n_epoch": 2}, marks=pytest.mark.slow),
        pytest.param({"limit_val_batches": 0}, marks=pytest.mark.slow),
        pytest.param({"accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        pytest.param({"limit_train_batches": 3}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param({"data": {"num_workers": 2}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_resumed_from_any_checkpoint_is_bit_identical(tmp_path, clip_folder, squares, settings):
    """Compares weights, average, thresholds, partition, labels, optimizer, all batches and all logged metrics."""
    saves = SaveAlways(tmp_path)
    state, rows, batches = run(tmp_path, clip_folder, squares, saves, **settings)
    assert len(saves.files) > 10
    for file, logged in saves.files:
        again, more, rest = run(tmp_path, clip_folder, squares, ckpt_path=file, **settings)
        last = file == saves.files[-1][0]  # no step follows, so the checkpoint has no optimizer state
        assert not (last and read_checkpoint(file)["optimizer_states"][0]["state"])
        assert again.keys() == {key for key in state if not (last and key.startswith("optimizer."))}, file.name
        assert differences(state, again) == [], file.name
        assert rest == batches[len(batches) - len(rest) :], file.name
        # The rows logged before the checkpoint and after resuming include all rows of the uninterrupted run.
        assert more == rows[len(rows) - len(more) :], file.name
        assert logged + len(more) >= len(rows), file.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_a_run_resumed_on_a_gpu_is_equal_up_to_rounding(tmp_path, clip_folder, squares, precision):
    """Compares up to rounding because GPU kernels are not deterministic; also restores the gradient scale."""
    saves, settings = SaveAlways(tmp_path), {"accelerator": "gpu", "devices": 1, "precision": precision}
    state, _, batches = run(tmp_path, clip_folder, squares, saves, **settings)
    for file, _ in saves.files[::3]:
        again, _, rest = run(tmp_path, clip_folder, squares, ckpt_path=file, **settings)
        assert rest == batches[len(batches) - len(rest) :], file.name
        print(file.name, len(differences(state, again)), "differ in bits")
        weights = {k: v.float() for k, v in state.items() if k.startswith(("network.", "ema.average"))}
        torch.testing.assert_close({k: again[k].float() for k in weights}, weights, atol=1e-2, rtol=1e-2)


def test_a_finished_run_cannot_be_extended_if_the_schedule_depends_on_its_length(tmp_path, clip_folder, squares):
    _, trainer = tiny_fit(tmp_path, clip_folder, squares, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(CheckpointError, match=r"end.ckpt: the semi-supervised stage .* 4 steps.* settings it has 8"):
        tiny_fit(tmp_path, clip_folder, squares, max_epochs=3, ckpt_path=str(tmp_path / "end.ckpt"))
    _, again = tiny_fit(tmp_path, clip_folder, squares, max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert again.global_step == trainer.global_step  # no step is left


def test_a_run_with_max_steps_can_be_extended(tmp_path, clip_folder, squares):
    """After resuming, the learning rates equal those of a run that had this length from the start."""

    class Rates(L.Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, *_):
            self.seen[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    def steps(number, ckpt_path=None):
        settings = {"max_steps": number, "callbacks": [rates := Rates()]}
        _, trainer = tiny_fit(tmp_path, clip_folder, squares, max_epochs=-1, trainer=settings, ckpt_path=ckpt_path)
        assert trainer.global_step == number
        return trainer, rates.seen

    file = str(tmp_path / "part.ckpt")
    steps(5)[0].save_checkpoint(file)
    _, rates = steps(9, file)
    whole = steps(9)[1]
    assert rates == pytest.approx({step: rate for step, rate in whole.items() if step > 5})


def test_sigterm_writes_a_checkpoint_of_the_last_step(tmp_path, clip_folder, squares):
    class Ask(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 1):
                signal.raise_signal(signal.SIGTERM)

    plain, *_ = run(tmp_path, clip_folder, squares)
    keep = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    with pytest.raises(SIGTERMException):
        run(tmp_path, clip_folder, squares, keep, Ask())
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 3)
    again, *_ = run(tmp_path, clip_folder, squares, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert differences(plain, again) == []


@pytest.mark.parametrize("moment", ["step", "epoch", "exchanged"])
def test_no_inconsistent_checkpoint_is_written(tmp_path, clip_folder, squares, moment):
    """Exceptions and signals may request a checkpoint in a step, at an epoch start, or while weights are swapped."""
    module, trainer = tiny_module(clip_folder), tiny_trainer(tmp_path)
    file, asked = tmp_path / "within.ckpt", []
    file.write_text("an earlier one")

    def save():
        asked.append(trainer.global_step)
        trainer.save_checkpoint(file)

    def before(method, due=lambda: True):
        def asking(*args, **kwargs):
            if due():
                save()
            return method(*args, **kwargs)

        return asking

    if moment == "step":  # the weights are updated, but their average is not
        module.ema.update = before(module.ema.update)
    elif moment == "epoch":
        progress = trainer.fit_loop.epoch_progress.current
        module.evaluating = before(module.evaluating, lambda: progress.started < progress.ready)
    else:
        module.network.forward = before(module.network.forward, lambda: module.ema.exchanged)
    with pytest.warns(UserWarning, match=r"within.ckpt is not written during a step"):
        trainer.fit(module, datamodule=tiny_data(squares))
    assert asked
    assert file.read_text() == "an earlier one"


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_resumed_run_stops_early_like_the_original(tmp_path, clip_folder, squares, at_the_end):
    def stops():
        return EarlyStopping("val/mAP", min_delta=9, patience=0, mode="max", check_on_train_epoch_end=at_the_end)

    settings = {} if at_the_end else {"val_check_interval": 0.5}
    saves = SaveAlways(tmp_path)
    state, rows, batches = run(tmp_path, clip_folder, squares, stops(), saves, **settings)
    assert batches[-1][0] == 1
    for file, _ in saves.files:
        again, more, _ = run(tmp_path, clip_folder, squares, stops(), ckpt_path=file, **settings)
        assert differences(state, again) == [], file.name
        assert more == rows[len(rows) - len(more) :], file.name


def test_resuming_with_other_data_is_refused(tmp_path, clip_folder, squares, squares_folder):
    _, trainer = tiny_fit(tmp_path, clip_folder, squares)
    file = str(tmp_path / "run.ckpt")
    trainer.save_checkpoint(file)
    hidden = Squares(squares_folder, hidden=[3])
    for source, data, what in (
        (squares, {"seed": 9}, "seed, split"),
        (squares, {"batch_size": 7}, "batch_size"),
        (hidden, {}, "table"),
    ):
        with pytest.raises(CheckpointError, match=f"run.ckpt was written with other data. These differ: {what}"):
            tiny_fit(tmp_path, clip_folder, source, data=data, ckpt_path=file)


def test_resuming_from_weights_only_is_refused(tmp_path, clip_folder, squares):
    module, trainer = tiny_fit(tmp_path, clip_folder, squares)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert newest_checkpoint(tmp_path) == tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match=r"best.ckpt contains only weights"):
        tiny_fit(tmp_path, clip_folder, squares, ckpt_path=str(tmp_path / "best.ckpt"))
    again = type(module).load_from_checkpoint(tmp_path / "best.ckpt")
    assert differences(dict(module.state_dict()), dict(again.state_dict())) == []


# Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, clip_folder, squares):
    folder = tmp_path_factory.mktemp("checkpoint")
    _, trainer = tiny_fit(folder, clip_folder, squares, max_epochs=2)
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


def test_every_changed_byte_is_detected(tmp_path, checkpoint):
    whole = checkpoint.read_bytes()
    content = read_checkpoint(checkpoint)
    file, unnoticed = tmp_path / "changed.ckpt", 0
    for place in range(70, len(whole), len(whole) // 60):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        file.write_bytes(bytes(changed))
        with contextlib.suppress(CheckpointError):  # padding bytes are not covered by a checksum
            assert differences(read_checkpoint(file)["state_dict"], content["state_dict"]) == []
            unnoticed += 1
    assert unnoticed < 20
    for size in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"changed\.ckpt"):
            read_checkpoint(file)


def test_checkpoints_load_with_weights_only(checkpoint):
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2
    assert read_checkpoint(checkpoint)[SOURCE] == str(checkpoint)


def test_urls_are_refused(clip_folder, squares, tmp_path):
    for ask in (
        lambda url: read_checkpoint(url),
        lambda url: type(tiny_module(clip_folder)).load_from_checkpoint(url),
        lambda url: tiny_trainer(tmp_path).fit(tiny_module(clip_folder), datamodule=tiny_data(squares), ckpt_path=url),
    ):
        with pytest.raises(CheckpointError, match=r"http://localhost:1/x.ckpt: .* local files only"):
            ask("http://localhost:1/x.ckpt")


def test_newest_checkpoint_ignores_incomplete_files(tmp_path, checkpoint):
    assert newest_checkpoint(tmp_path) is None
    content = torch.load(checkpoint, weights_only=True)
    for name, step, torn in (("a", 5, False), ("b", 9, False), ("c", 12, True)):
        torch.save({**content, "global_step": step, TORN: torn}, tmp_path / f"{name}.ckpt")
    torch.save({**content, "global_step": 40}, tmp_path / ".draft.ckpt")
    (tmp_path / "d.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:-100])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.warns(UserWarning, match="Skipped") as warned:
        assert newest_checkpoint(tmp_path) == tmp_path / "b.ckpt"
    told = " ".join(str(w.message) for w in warned)
    assert all(name in told for name in ("c.ckpt", "d.ckpt", "foreign.ckpt"))


def test_a_metrics_file_is_continued(tmp_path):
    rows = [(0, {"epoch": 0, "val/mAP": 0.5}), (0, {"epoch": 0, "train/loss": 2.0}), (4, {"epoch": 1, "val/mAP": 0.6})]

    def log(file, rows):
        for step, row in rows:
            file.log_metrics(row, step)
            file.save()

    log(MetricsFile(tmp_path), rows)
    whole = (tmp_path / "metrics.csv").read_text()
    # The run was interrupted after a later step, so resuming from step 0 logs the last row again.
    log(MetricsFile(tmp_path), [(8, {"epoch": 2, "val/mAP": 9.0})])
    log(MetricsFile(tmp_path), rows[1:])
    assert (tmp_path / "metrics.csv").read_text() == whole
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "0", "4"]
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"metrics.csv is not a table of metrics"):
        MetricsFile(tmp_path)


def test_a_resumed_logger_uses_its_folder(tmp_path):
    plain = CSVLogger(tmp_path / "runs", "cbsa")
    for folder in (tmp_path / "runs" / "cbsa" / "version_3", tmp_path / "elsewhere" / "mine"):
        again = going_on(plain, folder)
        assert isinstance(again, RunLogger)
        assert Path(again.log_dir) == folder
    other = Record()
    assert going_on(other, tmp_path) is other


def test_two_checkpoints_of_the_same_step_are_one_file(tmp_path, clip_folder, squares):
    keep = ModelCheckpoint(tmp_path / "all", "{epoch}", save_last=True, save_top_k=-1)
    best = ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val/mAP", mode="max", save_last=True)
    run(tmp_path, clip_folder, squares, keep, best)
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == [
        *(f"epoch={epoch}.ckpt" for epoch in range(3)), "last.ckpt"
    ]  # fmt: skip
    last = tmp_path / "all" / "last.ckpt"
    assert [last.samefile(file) for file in sorted((tmp_path / "all").glob("epoch*"))] == [False, False, True]
    for epoch in range(3):
        assert read_checkpoint(tmp_path / "all" / f"epoch={epoch}.ckpt")["epoch"] == epoch
    # After resuming, Lightning recognizes last.ckpt as its own file and does not write last-v1.ckpt.
    again = ModelCheckpoint(tmp_path / "all", "{epoch}", save_last=True, save_top_k=-1)
    run(tmp_path, clip_folder, squares, again, ckpt_path=tmp_path / "all" / "epoch=0.ckpt")
    assert not (tmp_path / "all" / "last-v1.ckpt").exists()


def test_without_hard_links_there_are_two_files(tmp_path, clip_folder, squares, monkeypatch):
    def refuses(*_):
        raise OSError

    monkeypatch.setattr(os, "link", refuses)
    run(tmp_path, clip_folder, squares, ModelCheckpoint(tmp_path / "all", "{epoch}", save_last=True))
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == ["epoch=2.ckpt", "last.ckpt"]
    assert read_checkpoint(tmp_path / "all" / "epoch=2.ckpt")["epoch"] == 2


def make_run(folder, checkpoint, **changes):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}\n")
    (folder / "run_id.txt").write_text(f"{folder.name}\n")
    content = {**torch.load(checkpoint, weights_only=True), "run_id": folder.name, **changes}
    torch.save(content, folder / "checkpoints" / "last.ckpt")


def words_of(*words):
    with resumed(words) as run:
        return run


def test_command_line_of_a_resumed_run(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words_of("fit", "--config", "x") == (["fit", "--config", "x"], None, None)
    with pytest.raises(ConfigError, match="runs has no run"):
        words_of("fit", "--resume")
    make_run(Path("runs/cbsa/version_0"), checkpoint)
    make_run(Path("runs/cbsa/version_1"), checkpoint)
    (tmp_path / "runs/cbsa/version_0/wandb_id.txt").write_text("abc\n")
    evaluation = tmp_path / "runs/cbsa/version_2"
    evaluation.mkdir()
    (evaluation / "config.yaml").write_text("{}\n")
    first, second = Path("runs/cbsa/version_0"), Path("runs/cbsa/version_1")
    expected = ["fit", f"--config={second}/config.yaml", f"--ckpt_path={second}/checkpoints/last.ckpt"]
    assert words_of("fit", "--resume") == (expected, second, None)
    for words in (["--resume", str(first)], [f"--resume={first}"]):
        found = words_of("fit", *words, "--trainer.devices=2")
        assert found.folder == first
        assert found.wandb_id == "abc"
        assert "--trainer.devices=2" in found.words
        assert not any("resume" in word for word in found.words)
    # With --config, the same command starts a run and later resumes it.
    assert words_of("fit", "--config=x", "--resume=new") == (["fit", "--config=x"], Path("new"), None)
    assert words_of("fit", "--config=x", f"--resume={second}").words[-1].startswith("--ckpt_path=")
    (second / "checkpoints" / ".last-1.ckpt").write_text("half")
    words_of("fit", "--resume", str(second))
    assert not (second / "checkpoints" / ".last-1.ckpt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.csv").write_text("my own\n")
    for words, message in (
        (["fit", "--config=x", "--resume=runs"], "runs is not a run but contains runs, such as runs/cbsa/version_0"),
        (["fit", "--config=x", "--resume"], "With --config, name the run"),
        (["fit", "--config=x", "--resume=mine"], "mine has predictions.csv, but is not a run"),
        (["fit", f"--resume={evaluation}"], "version_2 has no run"),
        (["test", "--resume", str(first)], "works only with `cbsa fit`"),
        (["fit", "--resume", str(first), "--ckpt_path=y"], "use either --ckpt_path"),
    ):
        with pytest.raises(ConfigError, match=message):
            words_of(*words)


def test_checkpoints_of_a_run_are_found_in_any_folder(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(tmp_path / name, checkpoint, global_step=5 if name == "a" else 9)
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints" / "last.ckpt").rename(shared / f"{name}.ckpt")
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "shared"}}]
    for config in ({"checkpoint": {"dirpath": "shared"}}, {"trainer": {"callbacks": callbacks}}):
        (tmp_path / "a" / "config.yaml").write_text(json.dumps(config))
        assert words_of("fit", "--resume=a").words[-1] == "--ckpt_path=shared/a.ckpt"
    (shared / "a.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"a has no checkpoint to resume from\. .* belong to another run: .*b\.ckpt"):
        words_of("fit", "--resume=a")


def test_a_run_without_a_checkpoint_restarts_only_if_nothing_is_lost(tmp_path, checkpoint):
    run = tmp_path / "run"
    make_run(run, checkpoint)
    file = run / "checkpoints" / "last.ckpt"
    weights = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in weights.items() if key != "optimizer_states"}, file)
    with pytest.raises(ConfigError, match=r"have only weights, .* belong to another run: checkpoints/last.ckpt"):
        words_of("fit", f"--resume={run}")
    file.unlink()
    (run / "metrics.csv").write_text("epoch,step,val/mAP\n0,1,0.5\n")
    assert words_of("fit", f"--resume={run}").words == ["fit", f"--config={run}/config.yaml"]
    (run / "metrics.csv").write_text("epoch,step,val/mAP\n0,1,0.5\n1,3,0.5\n")
    with pytest.raises(ConfigError, match="metrics of finished epochs, but no checkpoint"):
        words_of("fit", f"--resume={run}")


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, checkpoint, monkeypatch):
    run = tmp_path / "run"
    make_run(run, checkpoint)
    monkeypatch.setattr(runs, "_ENDING", 0.1)
    waiting, ready = os.pipe()
    other = os.fork()
    if not other:
        with resumed(["fit", f"--resume={run}"]):
            os.write(ready, b"1")
            signal.pause()
    os.read(waiting, 1)
    draft = run / "checkpoints" / ".last-1.ckpt"
    draft.write_text("of the other process")
    with pytest.raises(ConfigError, match="run is being trained by another process"):
        words_of("fit", f"--resume={run}")
    assert draft.exists()
    monkeypatch.setenv("NODE_RANK", "1")  # another process of the same job
    assert words_of("fit", f"--resume={run}").folder == run
    monkeypatch.delenv("NODE_RANK")
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert words_of("fit", f"--resume={run}").folder == run


def test_a_resumed_run_keeps_its_wandb_id(tmp_path, checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(
        lightning_cli, "make_cli", lambda words, folder: seen.append((folder, os.environ.get("WANDB_RUN_ID")))
    )
    make_run(tmp_path / "run", checkpoint)
    cli.main(["fit", f"--resume={tmp_path / 'run'}"])
    (tmp_path / "run" / "wandb_id.txt").write_text("abc\n")
    cli.main(["fit", f"--resume={tmp_path / 'run'}"])
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    cli.main(["fit", f"--resume={tmp_path / 'run'}"])
    assert seen == [(tmp_path / "run", None), (tmp_path / "run", "abc"), (tmp_path / "run", "abc")]
    assert os.environ["WANDB_RUN_ID"] == "mine"


def test_errors_for_unreadable_configurations_name_the_file(tmp_path):
    for name, content, message in (
        ("a.yaml", "trainer: [", r"a\.yaml cannot be read as YAML .*line \d"),
        ("b.yaml", "5", r"b\.yaml must contain a mapping"),
        ("c.yaml", "trainer: {max_epochs: 1}\n# \xe9", r"c\.yaml cannot be read as YAML .*utf-8"),
    ):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=message):
            cli.main(["fit", "--config", str(tmp_path / name)])
    with pytest.raises(ConfigError, match=r"d\.yaml: configuration file not found"):
        cli.main(["fit", f"--config={tmp_path / 'd.yaml'}"])
