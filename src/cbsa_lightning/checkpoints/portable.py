"""Stores the trained part of a checkpoint as `model.safetensors` and `config.json`, which take half the space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cbsa_lightning.checkpoints.files import MODEL, SOURCE, VERSION
from cbsa_lightning.checkpoints.lean import FINGERPRINT, FUSION, NETWORK
from cbsa_lightning.errors import CheckpointError, DataError
from cbsa_lightning.io.checksums import check_checksums
from cbsa_lightning.io.files import replacing
from cbsa_lightning.method.ema import ParameterEMA
from cbsa_lightning.networks.cbsa import SETTINGS

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
LABELS_FILE = "labels.json"
COPIED = ("class_names", "image_size", FINGERPRINT, NETWORK)  # entries of a checkpoint that are plain values

_NETWORK, _EMA, _STARTED, _CUT = "network.", "ema.", "ema.started", "cut"


def write_config(checkpoint: Mapping[str, Any], folder: Path, **more: Any) -> None:
    """Writes `config.json`, which describes how to build the network of a checkpoint.

    Args:
        checkpoint: Result of :func:`~cbsa_lightning.checkpoints.files.read_checkpoint`.
        folder: Output folder.
        **more: Additional entries.

    Raises:
        OutputError: If the file cannot be written.
    """
    settings = checkpoint["hyper_parameters"]
    config = {
        "cbsa_lightning": checkpoint.get(VERSION, version("cbsa-lightning")),
        **{name: checkpoint.get(name) for name in COPIED},
        "prompt_names": settings.get("prompt_names"),
        "settings": {name: settings[name] for name in SETTINGS if name in settings},
        "network": network_section(checkpoint),
        "averaged": _averaged(checkpoint["state_dict"]),
        **more,
    }
    with replacing(folder / CONFIG) as draft:
        draft.write_text(json.dumps(config, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_weights(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Writes `model.safetensors` with the averaged weights, the thresholds and the stack that scores are fused with.

    Raises:
        OutputError: If the file cannot be written.
    """
    state = checkpoint["state_dict"]
    tensors = {name: value for name, value in state.items() if name.startswith(_NETWORK) or name == _CUT}
    for name in _averaged(state):
        tensors[_NETWORK + name] = state[_EMA + ParameterEMA.key(name)]
    tensors |= {f"{FUSION}.{name}": value for name, value in checkpoint.get(FUSION, {}).items()}
    with replacing(folder / WEIGHTS) as draft:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, draft)


def read_portable(folder: Path) -> dict[str, Any]:
    """Reads the files of :func:`write_config` and :func:`write_weights` in the form of a checkpoint.

    Raises:
        CheckpointError: If a file is missing or damaged, or was changed.
    """
    try:
        # The thresholds are read from the weights. A labels file with other thresholds must not be ignored.
        check_checksums(folder, (CONFIG, WEIGHTS, *(name for name in (LABELS_FILE,) if (folder / name).is_file())))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        state = {name: value for name, value in tensors.items() if name.startswith(_NETWORK) or name == _CUT}
        for name in config["averaged"]:
            state[_EMA + ParameterEMA.key(name)] = state[_NETWORK + name]
        state[_STARTED] = torch.tensor(bool(config["averaged"]))
        checkpoint: dict[str, Any] = {name: config[name] for name in COPIED if config[name] is not None}
    except (DataError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded as an exported model ({error}). `cbsa export` writes one with --format "
            "safetensors."
        ) from error
    fusion = {name.removeprefix(f"{FUSION}."): value for name, value in tensors.items() if name.startswith(FUSION)}
    model = {"init_args": {"network": config.get("network")}}
    return {
        **checkpoint,
        **({FUSION: fusion} if fusion else {}),
        VERSION: config["cbsa_lightning"],
        MODEL: yaml.safe_dump(model),
        SOURCE: str(folder),
        "state_dict": state,
        "hyper_parameters": {**config["settings"], "prompt_names": config["prompt_names"]},
    }


def _averaged(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the network's weights that have an average; none before the average has started."""
    if _STARTED not in state or not bool(state[_STARTED]):
        return []
    names = (name.removeprefix(_NETWORK) for name in state if name.startswith(_NETWORK))
    return [name for name in names if _EMA + ParameterEMA.key(name) in state]


def network_section(checkpoint: Mapping[str, Any]) -> Any:
    """Returns the network section of a run's configuration, or None if the run trained CBSA itself."""
    try:
        return yaml.safe_load(checkpoint[MODEL])["init_args"]["network"]
    except (KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
