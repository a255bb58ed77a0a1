"""Lean checkpoints, which store a fingerprint of the frozen weights instead of the weights, and check it on loading."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from cbsa_lightning.checkpoints.files import SOURCE, VERSION, read_checkpoint
from cbsa_lightning.errors import CheckpointError, NotFiniteError, listed
from cbsa_lightning.method.finite import REMEDY, not_finite
from cbsa_lightning.method.fusion import Fusion
from cbsa_lightning.networks.compiled import class_of, plain_name

FINGERPRINT = "frozen_fingerprint"
NETWORK = "network_class"  # name of the network's class; earlier versions did not write it
TABLES = ("pseudo_labels", "context_targets", "expected", "left_out")
FUSION = "fusion"


class LeanCheckpoint(nn.Module):
    """Mix-in for a LightningModule with ``self.network``; the network may have a frozen ``clip``."""

    network: nn.Module
    fusion: Fusion | None = None
    class_names: list[str]
    _source = "The checkpoint"  # in messages, this names the file and the version that wrote it

    def _frozen_keys(self) -> set[str]:
        """Returns the state keys below ``network.clip`` whose weights are not trained."""
        clip = getattr(self.network, "clip", None)
        if clip is None:
            return set()
        trained = {name for name, p in clip.named_parameters() if p.requires_grad}
        frozen = (name for name in nn.Module.state_dict(clip) if name not in trained)
        return {f"network.clip.{plain_name(name)}" for name in frozen}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Loads a checkpoint as Lightning does, but never runs code from the file and rejects a URL.

        Raises:
            CheckpointError: If the path is a URL, or the file is damaged or not a checkpoint of this library.
        """
        if isinstance(checkpoint_path, (str, os.PathLike)):
            read_checkpoint(checkpoint_path, ("state_dict", "hyper_parameters"))
        above: Any = super()
        return cast(Self, above.load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True}))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the whole state except the frozen weights."""
        state = {plain_name(key): value for key, value in super().state_dict(*args, **kwargs).items()}
        frozen = self._frozen_keys()
        return {key: value for key, value in state.items() if key not in frozen}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Loads the state of :meth:`state_dict`.

        Raises:
            CheckpointError: If the keys or shapes differ from those of this module; the message names them.
        """
        here: dict[str, Tensor] = nn.Module.state_dict(self)
        key_of = {plain_name(key): key for key in here}
        own = {plain: here[key] for plain, key in key_of.items()}
        expected = own.keys() - self._frozen_keys()
        missing, extra = _sorted(expected - state_dict.keys()), _sorted(state_dict.keys() - own.keys())
        shapes = [
            f"{key} {_form(state_dict[key])} instead of {_form(own[key])}"
            for key in _sorted(expected & state_dict.keys())
            if _form(state_dict[key]) != _form(own[key])
        ]
        problems = [
            f"{what}: {listed(found, 5)}"
            for what, found in (("missing", missing), ("unknown", extra), ("other shape", shapes))
            if found
        ]
        if strict and any(key.startswith("network.decoder.layers.") for key in extra):
            raise CheckpointError(
                f"{self._source} was trained with an earlier label decoder, which this version does not "
                "have (docs/explanation/choices.md, 'Label-specific features'). Train again, or use the version that "
                "wrote it."
            )
        if strict and problems:
            raise CheckpointError(
                f"{self._source} is from another model; " + "; ".join(problems) + ". Build the module with the "
                "settings of the checkpoint (see config.yaml in the run's folder)."
            )
        if broken := _broken(state_dict):
            raise CheckpointError(
                f"{self._source} has weights that are not finite: {listed(broken, 5)}. Use another checkpoint."
            )
        state = {key_of.get(key, key): value for key, value in state_dict.items()}
        loaded: _IncompatibleKeys = super().load_state_dict(state, strict=False, assign=assign)
        return loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the fingerprint of the frozen weights and the tables of the current epoch.

        Raises:
            NotFiniteError: If weights are NaN or infinite. The checkpoint is not saved, so the last valid one is kept.
        """
        if broken := _broken(checkpoint["state_dict"]):
            raise NotFiniteError(
                f"Weights are not finite: {listed(broken, 5)}. They were not saved; earlier checkpoints are unchanged. "
                f"{REMEDY}."
            )
        checkpoint[VERSION] = version("cbsa-lightning")
        checkpoint[NETWORK] = class_of(self.network)
        clip = getattr(self.network, "clip", None)
        if clip is not None:
            checkpoint[FINGERPRINT] = clip.fingerprint
        checkpoint["class_names"] = list(self.class_names)
        data = getattr(getattr(self, "_trainer", None), "datamodule", None)
        size = getattr(data, "image_size", None)
        if size is not None:  # otherwise predictions would use the tower's native size
            checkpoint["image_size"] = size
        if self.fusion is not None:
            checkpoint[FUSION] = {name: tensor.cpu() for name, tensor in self.fusion.tensors().items()}
        for name in TABLES:
            table = getattr(self, name)
            if table is not None:
                checkpoint[name] = table.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint with other classes or other frozen weights.

        Raises:
            CheckpointError: If they differ; the message names both.
        """
        self._source = checkpoint.get(SOURCE, "The checkpoint")
        written, here = checkpoint.get(VERSION), version("cbsa-lightning")
        if written not in (None, here):
            self._source += f" (written by cbsa_lightning {written}, read by {here})"
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and trainer.state.fn == "fit" and "optimizer_states" not in checkpoint:
            raise CheckpointError(f"{self._source} contains only weights, so training cannot be resumed from it.")
        clip = getattr(self.network, "clip", None)
        if clip is not None and FINGERPRINT not in checkpoint:
            raise CheckpointError(f"{self._source} has no {FINGERPRINT}: it is unknown which frozen weights it needs.")
        stored = checkpoint.get("class_names", self.class_names)
        if list(stored) != list(self.class_names):
            raise CheckpointError(
                f"{self._source} has the classes {listed(stored)}; this module has {listed(self.class_names)}. "
                "Use the data settings of the checkpoint."
            )
        if clip is not None and checkpoint[FINGERPRINT] != clip.fingerprint:
            stored = str(checkpoint[FINGERPRINT])[:12]
            raise CheckpointError(
                f"{self._source} was trained with other frozen weights (sha256 {stored}...) than "
                f"the current ones ({clip.fingerprint[:12]}...). Load the model and weights that its config.yaml names."
            )
        self.fusion = None if FUSION not in checkpoint else self._read_fusion(checkpoint[FUSION])
        for name in TABLES:
            setattr(self, name, checkpoint.get(name))

    def _read_fusion(self, stored: Any) -> Fusion:
        try:
            fusion = Fusion.from_tensors(stored)
            fits = all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in stored.values())
            classes = {
                tensor.shape[-1]
                for name, tensor in stored.items()
                if name[:5] not in ("means", "limit", "share", "bound")
            }
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._source}: its {FUSION} is damaged ({error}). Use another checkpoint."
            ) from error
        if not fits or classes != {len(self.class_names)} or len(fusion.means) != len(fusion.weights):
            raise CheckpointError(f"{self._source}: its {FUSION} does not fit the classes. Use another checkpoint.")
        return fusion


def _broken(state: Mapping[str, Any]) -> list[str]:
    """Returns the names of weights and averages with NaN or infinity, which only thresholds may contain."""
    return _sorted(
        not_finite({k: v for k, v in state.items() if k.startswith(("network.", "ema.")) and isinstance(v, Tensor)})
    )


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"({type(value).__name__})"
    kind = "" if value.layout == torch.strided and not (value.is_meta or value.is_complex()) else " of another kind"
    return f"{tuple(value.shape)}{kind}"


def _sorted(keys: Iterable[str]) -> list[str]:
    """Sorts the keys so that those of the network come first; averages repeat them under less readable names."""
    return sorted(keys, key=lambda key: (key.startswith("ema."), key))
