"""Steps whose loss is not finite: found, named, and left out on all processes alike."""

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
    """Decides whether a step is taken.

    Args:
        module: The module that trains; not registered as a part of it.
        most: Steps in a row that may be left out; the next one stops the run.

    Attributes:
        leaves_out: Whether the optimizer step to come changes nothing.
    """

    def __init__(self, module: SSMLLModule, most: int) -> None:
        self._module = module
        self.most = most
        self.skipped = 0  # batches in a row without a finite loss, up to the present one
        self.leaves_out = False
        self._statistics: list[Tensor] = []

    def remember(self) -> None:
        """Keeps the running statistics, which a forward pass moves."""
        self._statistics = [value.clone() for value in self._module.ema.statistics(self._module.network)]

    def is_finite(self, loss: Tensor, output: NetworkOutput) -> bool:
        """Whether loss and logits are finite on all processes; the only synchronization of a step with its device.

        Logits too: those of labels that are ignored have no loss, but a gradient that is not finite.
        """
        trainer: Any = self._module.trainer
        finite = all_finite([loss, output.logits, output.context_logits])
        if trainer.world_size == 1:
            every = bool(finite)
        else:
            going_on = finite.new_tensor(not self._module.asked_to_end)
            both = trainer.strategy.reduce(torch.stack([finite, going_on]).float(), reduce_op="min").tolist()
            if not both[1]:  # Lightning ends after this step, on all processes now
                lightning_private.end_after_step(trainer)
            every = bool(both[0])
        if every:
            self.skipped = 0
        return every

    def left_out(self, terms: dict[str, Tensor], output: NetworkOutput, batch: TrainBatch) -> Tensor:
        """A loss whose step changes nothing.

        Raises:
            NotFiniteError: More steps in a row than may be left out; names terms, images and weights.
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
            raise NotFiniteError(
                f"{problem}. {REMEDY}; look at the images; max_skipped_steps lets such steps be left out."
            )
        rank_zero_warn(f"{problem}. The step is left out ({self.skipped} of {self.most} in a row).")
        # Gradients of all weights, since processes wait for each other's. A gradient scaler passes over a step with
        # NaN; without one, the callback Stages clears the gradients.
        every = torch.stack([p.sum() for p in module.network.parameters() if p.requires_grad]).sum()
        return every * (math.nan if self.scaled else 0.0)

    @property
    def scaled(self) -> bool:
        """Whether a gradient scaler passes such a step over by itself."""
        return getattr(self._module.trainer.precision_plugin, "scaler", None) is not None


def name_of_image(table: Any, row: Tensor) -> str:
    """Path of a row of a table, for a message; its number where there is no table."""
    return f"row {int(row)}" if table is None else f"{table.paths[int(row)]} (row {int(row)})"
