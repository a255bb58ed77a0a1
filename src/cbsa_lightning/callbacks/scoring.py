"""Scores all batches of a loader with the module in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cbsa_lightning.data.batches import EvalBatch
from cbsa_lightning.data.progress import shows_progress

Output = TypeVar("Output")


@torch.no_grad()
def score_batches(
    trainer: Any,
    pl_module: Any,
    loader: Iterable[EvalBatch],
    score: Callable[[Tensor], Output],
    keep: Callable[[EvalBatch, Tensor, Output], None],
    title: str,
) -> None:
    """Scores the images of a loader on this process; all processes must call this function.

    Args:
        trainer: The Trainer during a fit.
        pl_module: The module.
        loader: Loader of this process's batches.
        score: Computes scores from the frozen features of a batch, in the precision of the trainer.
        keep: Function that is called with each batch on the device, its frozen features and its scores.
        title: Title of the progress bar.
    """
    with pl_module.evaluating():
        for batch in tqdm(loader, desc=title, leave=False, disable=not shows_progress(trainer)):
            batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            with trainer.precision_plugin.forward_context():  # without the loader, which may stack float16 tensors
                features = pl_module.features_of(batch)
                output = score(features)
            keep(batch, features, output)
