"""Computes the partition of the classes into contexts (Eq. 9, 10) and the context of each image (Eq. 11)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cbsa_lightning.callbacks.thresholds import UpdateThresholds, data_of
from cbsa_lightning.data.incomplete import IncompleteImages
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.contexts import (
    context_targets,
    cooccurrence,
    match_partition,
    soft_context_targets,
)
from cbsa_lightning.method.labelers import positive_rates, rounded


class UpdateContexts(L.Callback):
    """Partitions the classes into contexts by the co-occurrence of their labels.

    The partition is computed from the labeled images before the first epoch. With a positive
    ``contexts.pseudo_weight``, each epoch of the second stage recomputes it, and pseudo-labeled images contribute with
    this weight. The contexts of a new partition get the ids of the previous contexts that they overlap with, since the
    context head has learned these ids.

    The context of a labeled image is computed from its known labels. For an unlabeled image, or a partly labeled image
    without a known positive, the network predicts the context from the weak view; if its confidence is too low, the
    image has no context. Unknown entries of labeled images are excluded from the first co-occurrence matrix; if the
    partition is recomputed, their pseudo-labels are used.

    If too few classes of the labeled images occur together, the run trains without contexts: there is no partition, and
    no image has a context.

    Args:
        thresholds: The callback that scores the weak views and runs before this one.
    """

    def __init__(self, thresholds: UpdateThresholds) -> None:
        self._thresholds = thresholds

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Computes the first partition from the labeled images.

        Raises:
            ConfigError: If there are more contexts than classes.
        """
        k, c = pl_module.num_contexts, len(pl_module.class_names)
        if k > c:
            raise ConfigError(f"{k} contexts cannot be formed from {c} classes. Choose num_contexts <= {c}.")
        data = data_of(trainer)
        labels = data.labeled_targets()
        if bool((pl_module.context_partition < 0).any()):
            try:
                self._partition(pl_module, labels, None)
            except ConfigError as error:  # too few classes occur together
                rank_zero_warn(
                    f"This run trains without contexts, since its {len(labels)} labeled images are too few: "
                    f"{error}. Set model.num_contexts to 0 to train without contexts."
                )
        self._label(pl_module, data, labels)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Updates the contexts of the unlabeled images, and the partition from labels and pseudo-labels."""
        if pl_module.stage != "semi-supervised" or bool((pl_module.context_partition < 0).any()):
            return
        data = data_of(trainer)
        if (probabilities := self._thresholds.weak_contexts) is not None:
            self._label_unlabeled(pl_module, data, probabilities)
        if not pl_module.contexts.pseudo_weight:
            return
        labels = data.labeled_targets()
        pseudo, filled = (
            rounded(pl_module.pseudo_labels[torch.as_tensor(rows, device=pl_module.device)]).cpu()
            for rows in (data.split.unlabeled, data.split.labeled)
        )
        # As in the paper, an ignored entry of an unlabeled image counts as absent, because such entries are not missing
        # at random.
        self._partition(pl_module, torch.where(labels >= 0, labels, filled), pseudo.clamp(min=0))
        self._label(pl_module, data, labels)

    @staticmethod
    def _partition(pl_module: Any, labels: Tensor, pseudo: Tensor | None) -> None:
        task, k = pl_module.contexts, pl_module.num_contexts
        weights = None
        if pseudo is not None:
            weights = torch.ones(len(labels) + len(pseudo)).float()
            weights[len(labels) :] = task.pseudo_weight
            labels = torch.cat([labels, pseudo])
        new = task.partition(cooccurrence(labels, weights=weights, power=task.power), k)
        old = pl_module.context_partition.cpu()
        if bool((old >= 0).all()):
            new = match_partition(new, old, k)
            pl_module.log("context/changed_classes", float((new != old).sum()))
        pl_module.context_partition.copy_(new)

    @staticmethod
    def _label(pl_module: Any, data: Any, labels: Tensor) -> None:
        """Sets the targets of the labeled images for the current partition; all zeros for an image without a label.

        Targets that are predicted from the weak view are not changed.
        """
        k, part = pl_module.num_contexts, pl_module.context_partition.cpu()
        if bool((part < 0).any()):  # targets of zeros have loss 0, but still yield the gradient that DDP waits for
            targets = torch.zeros(len(labels), k).float()
        elif pl_module.contexts.soft_targets:
            targets = soft_context_targets(labels, part, k)
        else:
            context = context_targets(labels, part, k, positive_rates(labels))
            targets = torch.nn.functional.one_hot(context.clamp(min=0), k) * (context >= 0)[:, None]
        if pl_module.context_targets is None:
            pl_module.context_targets = torch.zeros(len(data.train_table), k, device=pl_module.device).float()
        told = ~_undecided(labels)
        rows = torch.as_tensor(data.split.labeled[told.numpy()], device=pl_module.device)
        pl_module.context_targets[rows] = targets[told].to(pl_module.context_targets)

    @staticmethod
    def _label_unlabeled(pl_module: Any, data: Any, probabilities: Tensor) -> None:
        """Sets the targets of images without a known positive: a confident context of the weak view, or all zeros."""
        k = probabilities.shape[1]
        if pl_module.context_targets is None:
            pl_module.context_targets = probabilities.new_zeros(len(data.train_table), k)
        confidence, context = probabilities.max(1)
        sure = confidence > pl_module.contexts.confidence
        targets = torch.nn.functional.one_hot(context, k).to(probabilities) * sure[:, None]
        images = IncompleteImages.of(data)
        unlabeled = torch.ones(len(images.unlabeled), dtype=torch.bool)
        mine = torch.cat([unlabeled, _undecided(images.known)]).to(targets.device)
        rows = torch.as_tensor(images.rows, device=targets.device)[mine]
        pl_module.context_targets[rows] = targets[mine].to(pl_module.context_targets)
        pl_module.log("context/coverage", sure.float().mean())
        true_context = context_targets(data.hidden_targets(), pl_module.context_partition.cpu(), k)
        known = true_context >= 0
        if bool(known.any()):
            pl_module.log("context/accuracy", (context.cpu() == true_context)[known].float().mean())


def _undecided(labels: Tensor) -> Tensor:
    """Returns a mask ``(n,)`` of partly labeled images without a known positive, whose labels determine no context."""
    return ~(labels == 1).any(1) & (labels < 0).any(1)
