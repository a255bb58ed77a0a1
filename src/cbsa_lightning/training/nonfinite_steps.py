"""Detects steps with a non-finite loss, names the cause, and skips them on all processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cbsa_lightning import lightning_private
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.errors import NotFiniteError
from cbsa_lightning.method.finite import REMEDY, all_finite, not_finite, problem_of_step
from cbsa_lightning.networks.base import NetworkOutput

if TYPE_CHECKING:
    from cbsa_lightning.training.module import SSMLLModule


class NonFiniteSteps:
    """Decides whether a step is performed or skipped.

    Args:
        module: The trained module; not registered as a submodule.
        most: Number of consecutive steps that may be skipped. If there are more, the run stops.

    Attributes:
        leaves_out: Whether the next optimizer step is skipped.
    """

    def __init__(self, module: SSMLLModule, most: int) -> None:
        self._module = module
        self.most = most
        self.skipped = 0  # consecutive batches without a finite loss, including the current one
        self.leaves_out = False
        self._statistics: list[Tensor] = []

    def remember(self) -> None:
        """Stores the running statistics, so that they can be restored if the step is skipped."""
        self._statistics = [value.clone() for value in self._module.ema.statistics(self._module.network)]

    def is_finite(self, loss: Tensor, output: NetworkOutput) -> bool:
        """Returns whether loss and logits are finite on all processes.

        This is the only synchronization of a step with the device. Logits are also checked, because those of ignored
        labels do not contribute to the loss but can have a gradient that is not finite.
        """
        trainer: Any = self._module.trainer
        finite = all_finite([loss, output.logits, output.context_logits])
        if trainer.world_size == 1:
            every = bool(finite)
        else:
            going_on = finite.new_tensor(not self._module.asked_to_end)
            both = trainer.strategy.reduce(torch.stack([finite, going_on]).float(), reduce_op="min").tolist()
            if not both[1]:  # makes Lightning stop after this step on all processes
                lightning_private.end_after_step(trainer)
            every = bool(both[0])
        if every:
            self.skipped = 0
        return every

    def left_out(self, terms: dict[str, Tensor], output: NetworkOutput, batch: TrainBatch) -> Tensor:
        """Returns a loss whose step changes nothing.

        Raises:
            NotFiniteError: If too many consecutive steps are skipped; the message names loss terms, images and weights.
        """
        module = self._module
        trainer: Any = module.trainer
        self.skipped += 1
        self.leaves_out = True
        for kept, statistic in zip(self._statistics, module.ema.statistics(module.network), strict=True):
            statistic.copy_(kept)
        values = {**terms, "logits": output.logits}
        if output.context_logits is not None:
            values["context logits"] = output.context_logits
        table = getattr(getattr(trainer, "datamodule", None), "train_table", None)
        weights = not_finite(dict(module.network.named_parameters()))
        problem = problem_of_step(values, lambda i: name_of_image(table, batch.index[i]), weights)
        problem = f"Epoch {module.current_epoch}, step {trainer.fit_loop.epoch_loop.batch_idx}: {problem}"
        if self.skipped > self.most or weights:
            raise NotFiniteError(f"{problem}. {REMEDY}. Check the images, or set max_skipped_steps to skip such steps.")
        rank_zero_warn(f"{problem}. The step is skipped ({self.skipped} of {self.most} in a row).")
        # The loss has a gradient for each weight, since DDP waits for all of them. A gradient scaler skips a step with
        # NaN gradients; without a scaler, the callback Stages clears the gradients.
        every = torch.stack([p.sum() for p in module.network.parameters() if p.requires_grad]).sum()
        return every * (math.nan if self.scaled else 0.0)

    @property
    def scaled(self) -> bool:
        """Whether there is a gradient scaler, which skips such a step by itself."""
        return getattr(self._module.trainer.precision_plugin, "scaler", None) is not None


def name_of_image(table: Any, row: Tensor) -> str:
    """Returns the path and the row of an image for a message, or only the row if there is no table."""
    return f"row {int(row)}" if table is None else f"{table.paths[int(row)]} (row {int(row)})"
