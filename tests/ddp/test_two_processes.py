"""Two gloo processes give the steps, thresholds, pseudo-labels, contexts, weights and metrics of one process.

The runs of ``runs.py`` use float64, so that differences are not due to rounding.
"""

from __future__ import annotations

import csv

import numpy as np
import pytest
import runs
import torch

from cbsa_lightning.inference.labels.image_labels import read_labels
from tiny_data import CLASSES, Squares

TOLERANCE = 1e-9  # absolute and relative; weights change by 0.1 and more


@pytest.fixture(scope="module")
def root(tmp_path_factory, clip_folder, squares_folder):
    folder = tmp_path_factory.mktemp("ddp")
    runs.all_runs(folder, clip_folder, squares_folder)
    return folder


@pytest.fixture(scope="module")
def read(root):
    """Returns the results of a run: first of the single process, then of each of the two processes."""

    def read(name, world, rank=0):
        found = torch.load(root / str(world) / f"{name}-{rank}.pt", weights_only=False)
        assert "error" not in found, f"{name}, process {rank} of {world}: {found['error']}"
        return found

    return read


@pytest.fixture(scope="module")
def both(read):
    return lambda name: (read(name, 1), read(name, 2, 0), read(name, 2, 1))


def close(found, expected, what):
    """Asserts equality within TOLERANCE, including structure, NaN and None."""
    assert type(found) is type(expected), what
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            close(found[key], value, f"{what}, {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, f"{what}, {i}")
    elif isinstance(expected, torch.Tensor):
        allowed = TOLERANCE if expected.is_floating_point() else 0
        torch.testing.assert_close(
            found, expected, atol=allowed, rtol=allowed, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), what
    else:
        assert found == expected, what


def figures(epoch):
    return {name: value for name, value in epoch["figures"].items() if name != "time/ms_per_image"}


def same_run(found, expected):
    """Asserts equal tables of each epoch, metrics, weights and averages."""
    close(found["tables"], expected["tables"], "tables")
    for i, (a, b) in enumerate(zip(found["epochs"], expected["epochs"], strict=True)):
        close(figures(a), figures(b), f"figures of epoch {i}")
        for name in ("weights", "averages"):
            close(a[name], b[name], f"{name} of epoch {i}")


def processes_agree(first, second):
    """Asserts that the results of both processes are bit-identical."""
    for a, b in zip(first["tables"] + first["epochs"], second["tables"] + second["epochs"], strict=True):
        for key in a.keys() - {"epoch", "figures"}:
            pairs = [(a[key][n], b[key][n]) for n in a[key]] if isinstance(a[key], dict) else [(a[key], b[key])]
            for x, y in pairs:
                assert x is y is None or torch.equal(x.nan_to_num(-2.0), y.nan_to_num(-2.0)), key


# The paper's method -----------------------------------------------------------------------------------------------


def test_the_runs_have_uneven_batches(both, squares_folder):
    one, *two = both("run")
    sizes = [[len(step["index"]) for step in run["steps"]] for run in (one, *two)]
    assert sizes == [[5, 3, *[7, 7, 7, 4] * 2], [3, 2, *[4, 4, 4, 3] * 2], [2, 1, *[3, 3, 3, 1] * 2]]
    assert len(one["split"]) == 13
    source = Squares(squares_folder, train=runs.TRAIN)
    seen = {"validation": source.test().labels, "thresholds": source.train().labels[one["split"]]}
    seen["pseudo-labels"] = one["tables"][-1]["pseudo_labels"][torch.as_tensor(one["split"])].numpy()
    for name, labels in seen.items():
        has = [(labels[rank::2] == 1).any(0) for rank in (0, 1)]
        assert (has[0] != has[1]).any(), f"{name}: each class has positives in both processes"
    sure = one["tables"][1]["context_targets"][torch.as_tensor(one["split"])].sum(1)
    for rank in (0, 1):
        assert set(sure[rank::2].tolist()) == {0.0, 1.0}, "no process is sure of some contexts and not of others"


def test_steps_have_the_same_images(both):
    one, *two = both("run")
    for whole, *shares in zip(one["steps"], *(run["steps"] for run in two), strict=True):
        for labeled in (True, False):  # labeled and unlabeled images of the global batch are distributed separately
            expected = whole["index"][whole["labeled"] == labeled].tolist()
            for rank, share in enumerate(shares):
                assert share["index"][share["labeled"] == labeled].tolist() == expected[rank::2]
        views = dict(zip(whole["index"].tolist(), whole["images"], strict=True))
        if len(views) < len(whole["index"]):
            continue  # an image occurs twice, with two views
        for share in shares:
            for row, image in zip(share["index"].tolist(), share["images"], strict=True):
                assert torch.equal(image, views[row])


def test_loss_and_gradient_of_a_step(both):
    """The mean of the losses of both processes is the loss of the whole batch."""
    one, *two = both("run")
    losses = [[step["loss"] for step in run["steps"]] for run in (one, *two)]
    assert np.mean(losses[1:], axis=0) == pytest.approx(losses[0], rel=TOLERANCE, abs=TOLERANCE)
    assert np.abs(np.subtract(losses[1], losses[2])).max() > 0.1, "shares are too alike to tell"
    assert len(one["gradients"]) == 2
    for run in two:
        close(run["gradients"], one["gradients"], "gradients")


def test_tables_metrics_and_weights_of_every_epoch(both):
    one, *two = both("run")
    for run in two:
        same_run(run, one)
    processes_agree(*two)
    last = one["tables"][-1]
    assert last["epoch"] == 2
    assert all(last[name].isfinite().all() for name in ("tau_pos", "tau_neg", "cut", "positive_rate"))
    assert set(last["pseudo_labels"].flatten().tolist()) == {-1, 0, 1}
    assert set(last["context_partition"].tolist()) == {0, 1}
    assert last["context_targets"].any(0).all()
    names = {"val/mAP", "val/mAP_raw", *(f"val/AP/{name}" for name in CLASSES), "val/CF1", "val/OF1"}
    names |= {"train/loss", "train/loss_sup", "train/loss_unsup", "train/loss_aux"}
    names |= {"val/specific_gain", "val/feature_cosine"}
    names |= {"pseudo/precision", "pseudo/recall", "pseudo/coverage", "context/coverage", "context/accuracy"}
    assert names <= one["epochs"][-1]["figures"].keys()
    start, end = one["tables"][0]["weights"], one["epochs"][-1]["weights"]
    learned = [name for name in start if "context_head" not in name]  # the context head is also changed by the test
    assert max(float((end[name] - start[name]).abs().max()) for name in learned) > 0.1


def test_predictions(root, both):
    both("predictions")
    one, two = (list(csv.DictReader((root / str(world) / "predictions.csv").open())) for world in (1, 2))
    assert len(one) == 7
    for a, b in zip(two, one, strict=True):
        for name, value in b.items():
            if name in CLASSES:
                assert float(a[name]) == pytest.approx(float(value), abs=2e-6), "last digit of a score"
            else:
                assert a[name] == value


# Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world"), [("one to two", 2), ("two to one", 1), ("one to two to one", 1)])
def test_resuming_with_another_number_of_processes(root, read, name, world):
    """Resuming after the warm-up or within the second stage gives the result of an uninterrupted single process."""
    whole = read("run", 1)
    for rank in range(world):
        run = read(name, world, rank)
        left = len(run["epochs"])
        assert left == (1 if name == "one to two to one" else 2)
        same_run(run, {key: whole[key][-left:] for key in ("tables", "epochs")})
    ends = [torch.load(root / part / "epoch=2.ckpt", weights_only=True) for part in ("1/run", f"{world}/{name}")]
    for key in ("epoch", "global_step", "optimizer_states", "pseudo_labels", "context_targets"):
        close(ends[1][key], ends[0][key], key)
    begun = torch.load(root / "1" / "run" / "epoch=1.ckpt", weights_only=True)
    assert any("momentum_buffer" in state for state in begun["optimizer_states"][0]["state"].values())


@pytest.mark.parametrize(("name", "world"), [("one to two within", 2), ("two to one within", 1)])
def test_resuming_within_an_epoch_with_another_number_of_processes(root, read, name, world):
    """The metrics, which are means over steps before and after the checkpoint, are also equal."""
    whole = read("run", 1)
    for rank in range(world):
        run = read(name, world, rank)
        assert len(run["steps"]) == len(whole["steps"]) - 4  # two steps of the warm-up, two of the epoch
        same_run(run, {"tables": whole["tables"][-1:], "epochs": whole["epochs"][-2:]})


def test_both_processes_stop_after_the_same_step_if_one_gets_sigterm(root, read):
    assert all(read("asked to end", 2, rank)["ended"] for rank in range(2))
    checkpoint = torch.load(root / "2" / "asked to end" / "last.ckpt", weights_only=True)
    whole, run = read("run", 1), read("asked to end, then one", 1)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, len(whole["steps"]) - len(run["steps"]))
    same_run(run, {"tables": whole["tables"][-1:], "epochs": whole["epochs"][-2:]})


def test_checkpoints_of_one_and_two_processes_are_equal(root, both):
    both("run")
    for epoch in range(runs.EPOCHS):
        one, two = (torch.load(root / world / "run" / f"epoch={epoch}.ckpt", weights_only=True) for world in "12")
        assert one.keys() == two.keys()
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", *runs.TABLES[-2:]):
            assert (key in one) == (key != "pseudo_labels" or epoch >= runs.WARMUP)
            close(two.get(key), one.get(key), f"{key} of epoch {epoch}")


# Other runs -------------------------------------------------------------------------------------------------------


def test_cached_features_are_distributed_over_processes(read, both):
    one, *two = both("kept")
    again = read("kept again", 1)  # one process reads the features that two processes computed
    for run in (*two, again):
        same_run(run, one)
        assert all("images" not in step for step in run["steps"]), "images were read"
    processes_agree(*two)
    before, after = again["index"]
    assert before == after, "one process computed features again"
    # 36 bytes per key of the weak views, plain labeled views, strong views and test images.
    assert len(before) == 36 * (13 * 2 + 8 + 21 + 7)


def test_pseudo_labels_computed_once(both):
    one, *two = both("once")
    assert (one["tables"][0]["pseudo_labels"] > 0).any()
    assert one["tables"][0]["pseudo_labels"].is_floating_point()
    for run in two:
        same_run(run, one)
    processes_agree(*two)


def test_labels_of_unlabeled_images(root, both):
    both("once")
    one, two = (read_labels(next((root / str(world)).rglob("labels.csv"))) for world in (1, 2))
    assert len(one.images) == 13
    assert one.images.tolist() == two.images.tolist()
    np.testing.assert_allclose(two.probabilities, one.probabilities, atol=2e-6)
    assert np.array_equal(two.given, one.given)


PARTS = {
    "run": {"clip", "target_prompts", "semantic_prompts", "decoder", "log_scale", "context_head"},
    "CBSA without contexts": {"clip", "target_prompts", "semantic_prompts", "decoder", "log_scale"},
    "CBSA on labels alone": {"clip", "target_prompts", "semantic_prompts", "decoder", "log_scale", "context_head"},
    "CBSA without alignment": {"clip", "log_scale", "context_head"},
    "CBSA with a frozen pool": {"target_prompts", "semantic_prompts", "decoder", "log_scale"},
    "DualCoOp": {"positive_prompts", "negative_prompts"},
    "DualCoOp++": {"evidential_prompts", "positive_prompts", "negative_prompts", "log_temperature"},
    "SCPNet": {"prompts", "convolutions"},
    "TaI": {"global_prompts", "local_prompts", "log_scale"},
    "ImageNet": {"trunk", "head"},
    "ImageNet without batch norm": {"trunk", "head"},
}


@pytest.mark.parametrize("name", PARTS)
def test_plain_ddp_reduces_only_trained_parameters(both, name):
    """A parameter that a stage does not use would stop the run in the second step."""
    for run in both(name)[1:]:
        names = run["epochs"][-1]["weights"].keys()
        assert {weight.split(".")[1] for weight in names} == PARTS[name]
        assert all(weight.startswith("network.clip.pool.") for weight in names if ".clip." in weight)
        plain = {"strategy": "DDPStrategy", "options": {}, "finds unused": False, "static": False}
        assert run["wrapped"] == {**plain, "number": len(names)}
        stages = [step["labeled"].all().item() for step in run["steps"]]
        assert len(stages) >= 4
        assert all(stages[:2])


@pytest.mark.parametrize("name", runs.SYSTEMS)
def test_every_system(both, name):
    one, *two = both(name)
    processes_agree(*two)
    start, end = one["tables"][0]["weights"], one["epochs"][-1]["weights"]
    assert max(float((end[weight] - start[weight]).abs().max()) for weight in start) > 0.001
    if name == "ImageNet":
        return  # the statistics of batch norms differ between processes: docs/how_to/several_gpus.md
    for run in two:
        same_run(run, one)


@pytest.mark.parametrize("name", runs.PARTIAL)
def test_every_system_for_partial_labels(both, name):
    """Pairs of images, prototypes and banks use the whole batch in its order."""
    one, *two = both(name)
    sizes = [[len(step["index"]) for step in run["steps"]] for run in (one, *two)]
    assert sizes == [[5] * 6, [3] * 6, [2] * 6]
    processes_agree(*two)
    start, end = one["tables"][0]["weights"], one["epochs"][-1]["weights"]
    assert max(float((end[weight] - start[weight]).abs().max()) for weight in start) > 0.001
    for run in two:
        same_run(run, one)
