"""Computes the features of the frozen tower once before training if the data module caches them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cbsa_lightning.data.caches.feature_cache import Tower


class CacheFeatures(L.Callback):
    """Fills ``data.feature_cache`` before the first epoch if the cache is enabled; see :class:`FeatureCache`."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Computes missing features before a fit; before other passes, checks that the cache is from the same tower.

        This must happen in ``setup``, because Lightning builds the first loader when it sets up the optimizer.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "feature_cache", None) is None:
            return
        weights = pl_module.network.frozen_weights
        if weights is None:
            rank_zero_warn(
                f"{type(pl_module.network).__name__} has no frozen image tower, so data.feature_cache has no effect. "
                "Images are read and strong views are drawn in every epoch."
            )
            data.forget_features(None)
            return
        tower = _tower(trainer, pl_module, weights)
        if stage != "fit":
            data.forget_features(tower)
            return
        pl_module.to(trainer.strategy.root_device)  # Lightning moves the module only after this hook
        store, kept = data.compute_features(tower)
        trainer.strategy.barrier("features")  # each process has computed a part of the features
        data.use_features(tower, store, kept)


def _tower(trainer: L.Trainer, pl_module: Any, weights: str) -> Tower:
    def features(images: Tensor) -> Tensor:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            found: Tensor = pl_module.network.features(images.to(pl_module.device))
        return found

    return Tower(features, weights, str(trainer.precision))
