"""Checks before training."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from cbsa_lightning.callbacks import training_checks
from cbsa_lightning.callbacks.training_checks import TrainingChecks
from tiny_data import tiny_module


@pytest.mark.parametrize(
    ("precision", "width", "supported", "suggested"),
    [
        ("32-true", 1024, True, True),
        ("bf16-mixed", 1024, True, False),
        ("32-true", 64, True, False),
        ("32-true", 1024, False, False),
    ],
)
def test_bfloat16_is_suggested_if_the_processor_supports_it(
    clip_folder, monkeypatch, precision, width, supported, suggested
):
    printed = []
    monkeypatch.setattr(training_checks, "rank_zero_info", printed.append)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    module = tiny_module(clip_folder)
    module.network.clip.embed_dim = width
    trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False)
    TrainingChecks().setup(trainer, module, "fit")
    assert any("bf16-mixed" in line for line in printed) is suggested
