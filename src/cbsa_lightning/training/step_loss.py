"""The loss of a training step, term by term (Eq. 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cbsa_lightning.callbacks.hooks import moment_of
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.method.labelers import rounded
from cbsa_lightning.method.losses import context_loss, soft_target_loss
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.hooks import Batch
from cbsa_lightning.networks.processes import WholeBatch

if TYPE_CHECKING:
    from cbsa_lightning.training.module import SSMLLModule


def step_loss(
    module: SSMLLModule, output: NetworkOutput, batch: TrainBatch, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of a step and its terms.

    Every term of the paper is a sum over images (and classes) that is divided by the batch size B. This preserves the
    relative weights of the paper's sums. Terms of the training hooks are added without scaling.

    Args:
        module: The module that is trained.
        output: The output of the module's network for the batch.
        batch: The batch.
        step: The number of the step within the epoch.

    Returns:
        The loss, and its terms by name for logging.
    """
    size = _mean_batch_size(module, batch)
    targets = _targets(module, batch)
    loss_of = module.loss
    each = (
        soft_target_loss(loss_of, output.logits, targets)
        if targets.is_floating_point()
        else loss_of(output.logits, targets)
    )
    known = (batch.targets >= 0).to(torch.float32)
    sup = (each * known).sum(1).sum() / size
    unsup = (each * (1 - known)).sum(1).sum() / size
    loss = sup + module.unsup_weight * unsup
    terms = {"loss_sup": sup, "loss_unsup": unsup}
    if output.context_logits is not None and module.context_targets is not None:
        aux = context_loss(output.context_logits, module.context_targets[batch.index]).sum() / size
        loss = loss + module.contexts.weight * aux
        terms["loss_aux"] = aux
    if module.network.hooks is not None:
        hard = rounded(targets) if targets.is_floating_point() else targets
        added = _added(module, Batch(output, hard, WholeBatch(batch.labeled)), step)
        terms |= {f"loss_{name}": value for name, value in added.items()}
        # DDP waits for the gradient of every parameter, including those that no term uses yet.
        unused = sum((p.sum() for p in module.network.hooks.parameters() if p.requires_grad), torch.zeros(()).to(loss))
        loss = sum(added.values(), loss) + 0.0 * unused
    return loss, terms


def _added(module: SSMLLModule, batch: Batch, step: int) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = module.network.hooks.terms(module.network, batch, moment_of(module.trainer, step))
    return terms


def _targets(module: SSMLLModule, batch: TrainBatch) -> Tensor:
    """Returns the labels and pseudo-labels ``(B, C)``; pseudo-labels may be soft."""
    if module.pseudo_labels is None:
        return batch.targets
    return torch.where(batch.targets >= 0, batch.targets, module.pseudo_labels[batch.index])


def _mean_batch_size(module: SSMLLModule, batch: TrainBatch) -> float | Tensor:
    """Returns the mean number of images per process; dividing by it makes DDP's average of the gradients exact.

    With one process, the result is a number, so nothing is copied to the device.
    """
    size = float(len(batch.index))
    if module.trainer.world_size == 1:
        return size
    return module.trainer.strategy.reduce(torch.tensor(size, device=module.device), reduce_op="mean")
