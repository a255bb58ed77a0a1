"""Calls the training hooks of a network before training, before epochs and before optimizer steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from cbsa_lightning.callbacks.scoring import score_batches
from cbsa_lightning.callbacks.thresholds import data_of
from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.hooks import Moment, Seen
from cbsa_lightning.networks.processes import number


class RunHooks(L.Callback):
    """Calls the training hooks of a network, if any; see :class:`~cbsa_lightning.networks.hooks.TrainingHooks`."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Passes the labels to the hooks."""
        if (hooks := pl_module.network.hooks) is not None:
            hooks.before_training(pl_module.network, data_of(trainer).labeled_targets())

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Computes features with the raw weights, and passes those that the hooks select to the hooks."""
        if (hooks := pl_module.network.hooks) is None:
            return
        data, moment = data_of(trainer), moment_of(trainer, 0)
        wanted = hooks.wanted(data.labeled_targets(), moment)
        if wanted is not None:
            hooks.before_epoch(self._seen(trainer, pl_module, data, wanted), moment)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Excludes idle parameters from the step; only DDP needs their zero gradients."""
        hooks = pl_module.network.hooks
        if hooks is not None and hooks.idle(moment_of(trainer, 0)):
            for parameter in hooks.parameters():
                parameter.grad = None

    @staticmethod
    def _seen(trainer: L.Trainer, pl_module: Any, data: Any, wanted: Tensor) -> Seen:
        chosen = wanted.any(1)
        rows = data.split.labeled[chosen.numpy()]
        if len(rows) < trainer.world_size:
            raise ConfigError(
                f"{type(pl_module.network).__name__} computes prototypes from {len(rows)} image(s) with known "
                f"positives, but each of the {trainer.world_size} process(es) needs one. Label more images."
            )
        place = torch.full((len(data.train_table),), -1)
        place[torch.as_tensor(data.split.labeled)] = torch.arange(len(wanted))
        found: list[Any] = []  # rows, classes, features and notes of a batch

        def keep(batch: EvalBatch, _: Tensor, output: NetworkOutput) -> None:
            here = place[batch.index.cpu()]
            image, classes = wanted[here].nonzero(as_tuple=True)
            if output.label_features is None:
                raise ConfigError(f"{type(pl_module.network).__name__} has hooks, but no label_features for them.")
            notes = None if output.notes is None else output.notes[image, classes].cpu()
            found.append((here[image], classes, output.label_features[image, classes].float().cpu(), notes))

        def score(features: Tensor) -> NetworkOutput:
            output: NetworkOutput = pl_module.score(features, "raw")
            return output

        score_batches(trainer, pl_module, data.plain_dataloader(rows), score, keep, "Prototypes")
        if number() > 1:
            each: list[Any] = [None] * number()
            dist.all_gather_object(each, found)
            found = [part for of_process in each for part in of_process]
        rows_of, classes_of, features = (torch.cat([part[i] for part in found]) for i in range(3))
        notes = [part[3] for part in found if part[3] is not None]
        order = (rows_of * wanted.shape[1] + classes_of).argsort()
        return Seen(rows_of[order], classes_of[order], features[order], torch.cat(notes)[order] if notes else None)


def moment_of(trainer: Any, step: int) -> Moment:
    """Returns the moment of a step in the current epoch."""
    seed = getattr(getattr(trainer, "datamodule", None), "seed", 0)
    return Moment(trainer.current_epoch, step, max(int(trainer.num_training_batches), 1), seed)
