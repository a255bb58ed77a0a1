"""Checks before the first step that monitored metrics exist, since an error after an epoch would be late."""

from __future__ import annotations

import difflib
from typing import Any

import lightning as L

from cbsa_lightning.errors import ConfigError, listed
from cbsa_lightning.method.metrics import REPORTED

_OURS = ("cbsa_lightning", "lightning")


class CheckMonitors(L.Callback):
    """Raises an error if a callback monitors a metric that is never logged.

    Nothing is checked if the module or a callback is from another package, since it may log its own metrics.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks ``monitor`` of all callbacks.

        Raises:
            ConfigError: If a metric does not exist; the message suggests similar names.
        """
        if any(type(part).__module__.split(".")[0] not in _OURS for part in (pl_module, *trainer.callbacks)):
            return
        known = logged_names(pl_module)
        for callback in trainer.callbacks:
            name = getattr(callback, "monitor", None)
            if name is not None and name not in known:
                similar = difflib.get_close_matches(name.replace("_", "/", 1), known, cutoff=0.4) or ["val/mAP"]
                raise ConfigError(
                    f"{type(callback).__name__} monitors {name!r}, which this run does not log. Use a metric such as "
                    f"{listed(similar)}."
                )


def logged_names(pl_module: Any) -> list[str]:
    """Returns the names of all metrics that may be logged while ``pl_module`` is trained."""
    names = [f"val/{name}" for name in ("mAP", "mAP_raw", *REPORTED)]
    names += ["val/mAP_network"] if pl_module.stack_share else []
    names += [f"val/AP/{name}" for name in pl_module.class_names]
    names += [f"train/{name}" for name in ("loss", "loss_sup", "loss_unsup")]
    names += [f"pseudo/{name}" for name in ("coverage", "precision", "recall", "CF1")]
    if pl_module.specificity is not None:
        names += ["val/feature_cosine", "val/specific_gain"]
    if pl_module.num_contexts:
        names += ["train/loss_aux", "context/coverage", "context/accuracy"]
        names += ["context/changed_classes"] if pl_module.contexts.pseudo_weight else []
    return [*names, "time/ms_per_image"]
