"""A checkpoint to export."""

from __future__ import annotations

import torch

from tiny_data import tiny_module, tiny_trainer


def checkpoint_of(clip, file, **settings):
    """Writes a checkpoint with random weights, their averages, and thresholds, one of which is infinite."""
    module = tiny_module(clip, **settings)
    module.ema.start(module.network)
    with torch.no_grad():
        for parameter in module.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    module.ema.update(module.network)
    module.cut.copy_(torch.tensor([0.3, 0.5, float("inf"), 0.6, 0.4]))
    trainer = tiny_trainer(file.parent)
    trainer.strategy.connect(module.eval())
    trainer.save_checkpoint(file)
    return file
