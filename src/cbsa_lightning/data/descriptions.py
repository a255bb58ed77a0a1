"""Computation of the frozen descriptions of many images, distributed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.data.progress import shows_progress
from cbsa_lightning.data.protocol import semi_supervised
from cbsa_lightning.method.finite import refuse_scores
from cbsa_lightning.method.labelers import Evidence
from cbsa_lightning.networks.base import Description


def evidence_of(trainer: Any, pl_module: Any, unlabeled: bool = True) -> Evidence:
    """Computes the frozen descriptions of labeled images and then of unlabeled images. Also returns the labels.

    Args:
        trainer: A Trainer that is running ``fit``.
        pl_module: The module before training, so that its attention pool has the weights of CLIP.
        unlabeled: Whether to describe the unlabeled images as well.
    """
    data = semi_supervised(trainer.datamodule)
    rows = np.concatenate([data.split.labeled, data.split.unlabeled if unlabeled else []]).astype(np.int64)
    files = data.train_table.paths[rows]
    found = describe_images(trainer, pl_module, data.plain_dataloader(rows), rows, files)
    return Evidence(*found, torch.arange(len(data.split.labeled)), data.labeled_targets())


@torch.no_grad()
def describe_images(
    trainer: Any, pl_module: Any, loader: Iterable[EvalBatch], rows: np.ndarray, files: np.ndarray
) -> Description:
    """Computes descriptions of images with the frozen towers. Must be called on all ranks.

    Args:
        trainer: A Trainer that is running ``fit``.
        pl_module: The module.
        loader: Loader of this rank's part of the images.
        rows: ``(n,)``, row indices as in the batches. They determine the order of the result.
        files: ``(n,)``, the files of these rows, for error messages.

    Raises:
        NotFiniteError: If a description is not finite. The message names the file.
    """
    describe: Callable[[Tensor], Description] = pl_module.network.describer()
    place = torch.zeros(int(rows.max(initial=0)) + 1, dtype=torch.int64, device=pl_module.device)
    place[torch.as_tensor(rows, device=pl_module.device)] = torch.arange(len(rows), device=pl_module.device)
    tables: list[Tensor] = []
    split = 0
    for batch in tqdm(loader, desc="Descriptions", leave=False, disable=not shows_progress(trainer)):
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
        with trainer.precision_plugin.forward_context():
            found = describe(pl_module.features_of(batch))
        parts = [*found.descriptors, *found.scores]
        split = len(found.descriptors)
        # float32 is used regardless of the precision of training and of torch's default dtype.
        tables = tables or [part.float().new_zeros(len(rows), part.shape[1]) for part in parts]
        for table, part in zip(tables, parts, strict=True):
            table[place[batch.index]] = part.float()
    # Each rank has filled only its own rows, and the other rows are zero.
    tables = [trainer.strategy.reduce(table, reduce_op="sum") for table in tables]
    for table in tables:
        refuse_scores(table, files.__getitem__, "Descriptions by the frozen towers")
    return Description(tables[:split], tables[split:])
