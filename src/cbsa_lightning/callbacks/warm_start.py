"""Starts training from the weights of an earlier run."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cbsa_lightning.checkpoints.warm_start import Earlier, check_fits, take_over


class StartFrom(L.Callback):
    """Starts a new run from the averaged weights of a checkpoint, without its optimizer, epoch and tables.

    This has no effect on a network without trained parts. A resumed run continues from its own checkpoint.

    Args:
        earlier: The checkpoint.
    """

    def __init__(self, earlier: Earlier) -> None:
        self.earlier = earlier

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks before training that the weights fit.

        Raises:
            CheckpointError: See :func:`~cbsa_lightning.checkpoints.warm_start.check_fits`.
        """
        if stage == "fit" and trainer.ckpt_path is None:
            check_fits(self.earlier, pl_module.network, _state(pl_module), pl_module.class_names)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Loads the weights before the first step.

        They cannot be loaded earlier, because the baselines and pseudo-labels that are computed once need CLIP's own
        attention pool. They cannot be loaded later, because the weight average starts from these weights.
        """
        if trainer.ckpt_path is not None or trainer.global_step or trainer.current_epoch:
            return
        if not pl_module.trains:
            rank_zero_info(f"Nothing is trained in this run, so it does not use the weights of {self.earlier.source}.")
            return
        own = _state(pl_module)
        partition = pl_module.context_partition.cpu()
        rank_zero_info(take_over(self.earlier, pl_module.network, own, pl_module.class_names, partition))


def _state(pl_module: Any) -> dict[str, Tensor]:
    """Returns the network's state without frozen weights; shares memory with the network."""
    state = pl_module.state_dict()
    return {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
