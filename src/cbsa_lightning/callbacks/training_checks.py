"""Checks the precision, the number of processes and the batch norms before training."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from cbsa_lightning.errors import ConfigError


class TrainingChecks(L.Callback):
    """Prints the name of the CLIP weights, and rejects settings for which training would fail without an error."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks the precision and the number of processes.

        Raises:
            ConfigError: If weights are in half precision, or if there are several processes but no trainable weights.
        """
        clip = getattr(pl_module.network, "clip", None)
        weights = getattr(clip, "weights", None)
        if weights is not None:
            rank_zero_info(f"Weights of CLIP: {weights}.")
        if stage != "fit":
            return
        if weights is not None and _gains_from_bfloat16(trainer, clip):
            rank_zero_info(
                "This processor computes in bfloat16. trainer.precision 'bf16-mixed' is about twice as fast as float32 "
                "(docs/explanation/speed.md)."
            )
        if not pl_module.trains and trainer.world_size > 1:
            raise ConfigError(
                f"{type(pl_module.network).__name__} has nothing to train. Use one process (--trainer.devices 1)."
            )
        if trainer.precision in ("16-true", "bf16-true"):
            mixed = str(trainer.precision).replace("true", "mixed")
            raise ConfigError(
                f"trainer.precision {trainer.precision!r} stores the averaged weights in half precision, which is "
                f"too coarse for their small steps. Use {mixed!r}."
            )
        if half := {p.dtype for p in pl_module.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}:
            raise ConfigError(
                f"Trained weights are {half.pop()}, which is too coarse for the small steps of their average. Build "
                "the module with torch's default dtype float32, and train with trainer.precision '16-mixed'."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Warns if the number of processes affects the result."""
        layers = [layer for layer in pl_module.network.modules() if isinstance(layer, _BatchNorm)]
        own = [
            layer
            for layer in layers
            if layer.weight is not None and layer.weight.requires_grad and not isinstance(layer, SyncBatchNorm)
        ]
        if trainer.world_size > 1 and own:
            rank_zero_warn(
                f"{len(own)} batch norms are trained on each process's own images, so the result depends on the number "
                "of processes. With plain ResNets, sync_batchnorm=True synchronizes them (docs/how_to/several_gpus.md)."
            )


def _gains_from_bfloat16(trainer: Any, clip: Any) -> bool:
    """Returns whether a run in float32 on the CPU would be faster in bfloat16. Small CLIP models would not."""
    if trainer.precision != "32-true" or trainer.strategy.root_device.type != "cpu" or clip.embed_dim < 256:
        return False
    # This function does not exist in torch 2.10.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
