"""The method on one page of plain torch gives the weights of ``CBSAModule``."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from cbsa_lightning import CBSAModule, SSMLLDataModule
from cbsa_lightning.data.augmentations import CutoutRandAugment
from cbsa_lightning.data.readers.digits import Digits
from tiny_data import tiny_trainer

PAGE = Path(__file__).resolve().parents[1] / "examples" / "one_page.py"


def test_the_page_is_short():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 90


def test_both_stages_equal_the_module(tmp_path):
    """Without dropout, whose masks depend on the step in the module, all weights are bit-identical."""
    source = Digits(str(tmp_path / "digits"), num_train=40, num_test=40)
    train = runpy.run_path(str(PAGE))["train"]
    network, average, mean_ap = train(source, share=0.4, warmup=1, epochs=3, dropout=0.0, seed=1)

    torch.manual_seed(1)
    module = CBSAModule(
        source.class_names,
        source.prompt_names,
        clip="embedded",
        num_contexts=3,
        prompt_length=4,
        decoder_feedforward=256,
        decoder_dropout=0.0,
        warmup_epochs=1,
        ema_decay=0.98,
    )
    data = SSMLLDataModule(
        source,
        image_size=160,
        labeled_fraction=0.4,
        seed=1,
        batch_size=48,
        labeled_per_batch=16,
        warmup_batch_size=16,
        strong_view=CutoutRandAugment(0.25),
        num_workers=0,
    )
    trainer = tiny_trainer(tmp_path, max_epochs=3)
    trainer.fit(module, datamodule=data)
    weights = dict(network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in module.network.named_parameters())
    assert all(torch.equal(average.get_buffer(name), value) for name, value in module.ema.named_buffers())
    assert mean_ap == pytest.approx(float(trainer.callback_metrics["val/mAP"]), abs=1e-6)
