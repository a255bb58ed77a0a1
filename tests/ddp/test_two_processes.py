"""Two gloo processes do what one does: the same thresholds, pseudo-labels, contexts, weights and metrics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from cbsa_lightning.data.feature_cache import FeatureCache
from cbsa_lightning.stacking import StackedProbes
from tiny_data import Squares, tiny_fit

TOLERANCE = 1e-5  # of float64 weights: losses and cosines are taken in float32; prompts move by 0.6


class Record(L.Callback):
    """Each process writes what it has at the first step of each epoch and at the end."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _save(self, trainer, module, when):
        record = {
            "tau_pos": module.tau_pos,
            "tau_neg": module.tau_neg,
            "partition": module.context_partition,
            "pseudo_labels": module.pseudo_labels,
            "context_targets": module.context_targets,
            "weights": {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad},
            "average": module.ema.get_buffer("average_of_target_prompts__words"),
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        }
        torch.save(record, self.folder / f"{when}-{trainer.global_rank}-of-{trainer.world_size}.pt")

    def setup(self, trainer, module, stage):
        # Channels-last kernels round differently for other batch sizes, and a pseudo-label that ties within rounding
        # would then differ between one process and two: these tests are of the algorithm.
        module.network.clip.tower.to(memory_format=torch.contiguous_format)
        # Untrained, the decoder hardly looks at the image: logits of two images differ by less than rounding.
        with torch.no_grad():
            module.network.decoder.layers[0].multihead_attn.out_proj.weight.mul_(30)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self._save(trainer, module, trainer.current_epoch)

    def on_train_end(self, trainer, module):
        self._save(trainer, module, "end")


@pytest.fixture(scope="module")
def records(tmp_path_factory, clip_folder, squares_folder):
    """Both runs: 13 unlabelled and 7 test images, so shards and the last batch (4 + 1) are uneven."""
    folder = tmp_path_factory.mktemp("ddp")
    for settings in ({}, {"devices": 2, "strategy": "ddp_spawn"}):
        tiny_fit(
            folder,
            clip_folder,
            Squares(squares_folder, train=21),
            trainer={"callbacks": [Record(folder)], "precision": "64-true", **settings},
            warmup_epochs=0,
            decoder_dropout=0.0,
            optimizer=partial(torch.optim.SGD, lr=0.01),
        )

    def read(when):
        return [torch.load(folder / f"{when}-{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2")]

    return read


@pytest.mark.parametrize("when", [0, 1, "end"])
def test_tables_of_the_epoch(records, when):
    one, *two = records(when)
    assert one["tau_pos"].isfinite().any()
    assert len(one["pseudo_labels"]) == 21
    for other in two:
        for name in ("tau_pos", "tau_neg"):
            torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=0)
        for name in ("partition", "pseudo_labels", "context_targets"):
            assert torch.equal(other[name], one[name]), name
    for name in ("tau_pos", "pseudo_labels", "partition", "context_targets"):
        assert torch.equal(two[0][name], two[1][name]), "processes disagree"


def test_weights_learn_the_same(records):
    start, (one, *two) = records(0)[0], records("end")
    assert len(one["weights"]) > 10
    for other in two:
        for name, value in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], value, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(other["average"], one["average"], atol=TOLERANCE, rtol=0)
    moved = max(float((one["weights"][name] - start["weights"][name]).abs().max()) for name in one["weights"])
    assert moved > 1000 * TOLERANCE
    assert all(torch.equal(two[0]["weights"][name], two[1]["weights"][name]) for name in one["weights"])


def test_metrics(records):
    one, *two = records("end")
    for other in two:
        for name in ("train/loss", "train/loss_sup", "train/loss_unsup", "train/loss_aux"):
            assert other["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name
        for name in ("val/mAP", "val/mAP_raw", "val/CF1", "val/OF1", "pseudo/precision", "pseudo/coverage"):
            assert other["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-6), name


def test_kept_features_are_computed_in_shares(tmp_path, clip_folder, squares_folder):
    """Two processes fill one cache; what they then learn is what one process learns from it."""
    found = []
    for settings in ({"devices": 2, "strategy": "ddp_spawn"}, {}):
        tiny_fit(
            tmp_path,
            clip_folder,
            Squares(squares_folder, train=21),
            data={"feature_cache": FeatureCache(str(tmp_path / "cache"), strong_views=1)},
            trainer={"callbacks": [Record(tmp_path)], "precision": "64-true", **settings},
            warmup_epochs=0,
            max_epochs=1,
            decoder_dropout=0.0,
            optimizer=partial(torch.optim.SGD, lr=0.01),
        )
        found.append(next((tmp_path / "cache").glob("features-*/index.bin")).read_bytes())
    assert found[0] == found[1], "one process computed something anew"
    assert len(found[0]) == 36 * (13 * 2 + 21 + 7)  # bytes a key; weak views, strong views, test images
    one, *two = (torch.load(tmp_path / f"end-{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    for other in two:
        assert torch.equal(other["pseudo_labels"], one["pseudo_labels"])
        for name, value in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], value, atol=TOLERANCE, rtol=0)


def test_labels_made_once_are_the_same(tmp_path, clip_folder, squares_folder):
    for settings in ({"devices": 2, "strategy": "ddp_spawn"}, {}):
        tiny_fit(
            tmp_path,
            clip_folder,
            Squares(squares_folder, train=21),
            trainer={"callbacks": [Record(tmp_path)], "precision": "64-true", **settings},
            labeler=StackedProbes(),
            warmup_epochs=0,
            max_epochs=1,
            decoder_dropout=0.0,
            optimizer=partial(torch.optim.SGD, lr=0.01),
        )
    one, *two = (torch.load(tmp_path / f"end-{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert (one["pseudo_labels"] > 0).any()
    assert torch.equal(two[0]["pseudo_labels"], two[1]["pseudo_labels"])
    for other in two:
        torch.testing.assert_close(other["pseudo_labels"], one["pseudo_labels"], atol=1e-3, rtol=0)
        for name, value in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], value, atol=10 * TOLERANCE, rtol=0)
