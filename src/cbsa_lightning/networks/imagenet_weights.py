"""Trunks of timm with ImageNet weights: by the weights' tag, from a file, or random."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, cast

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cbsa_lightning.clip.loading import RANDOM
from cbsa_lightning.errors import ConfigError, WeightsError, listed

TIMM = "timm"  # the default of `pretrained`: the weights of the backbone's tag
WAYS = (
    "Ways to get weights: (1) with network access, timm downloads them once into the Hugging Face cache, and that "
    "cache (HF_HOME) can be copied to a machine without access; (2) download the file elsewhere and give "
    "pretrained=<file>, a .safetensors file of timm or a .pth file of torchvision; (3) pretrained='random' for random "
    "weights, useful only in tests."
)


def width(trunk: nn.Module) -> int:
    """Returns D, the number of channels of the last map of a trunk."""
    return cast(int, trunk.num_features)


def channels(name: str, values: Sequence[float] | None, default: float) -> Tensor:
    """Returns three channel statistics as ``(1, 3, 1, 1)``.

    Raises:
        ConfigError: They are not three numbers; ``name`` is the argument's name.
    """
    values = [default] * 3 if values is None else values
    if len(values) != 3:
        raise ConfigError(f"{name} must be three numbers, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def load_trunk(backbone: str, pretrained: str | None) -> nn.Module:
    """Returns the timm model without its classifier and pooling, with the requested weights.

    Args:
        backbone: Name of a timm model, with the tag of its weights.
        pretrained: "timm" for the weights of the tag, a file of weights, or "random".

    Raises:
        ConfigError: timm has no such model.
        WeightsError: The weights are not available or do not fit; lists the ways to get them.
    """
    if pretrained is None:
        raise ConfigError(
            f"pretrained of backbone {backbone!r} is null, which names no weights. Give '{TIMM}', a file, or "
            f"'{RANDOM}' for random weights."
        )
    names = [*timm.list_models(), *timm.list_pretrained()]
    if backbone not in names:
        near = get_close_matches(backbone, names, n=5)
        raise ConfigError(
            f"timm {timm.__version__} has no model {backbone!r}" + (f"; similar names: {listed(near)}" if near else "")
        )
    try:
        trunk: nn.Module = timm.create_model(backbone, pretrained=pretrained == TIMM, num_classes=0, global_pool="")
    except Exception as error:  # timm, the hub and torch raise many kinds of exceptions
        if pretrained == TIMM:
            _fail(f"the ImageNet weights of {backbone}, {_home(backbone)}, could not be loaded: {error}", error)
        raise ConfigError(f"timm cannot build {backbone!r} without its classifier: {error}") from error
    if pretrained not in (RANDOM, TIMM):
        _load_file(trunk, Path(pretrained).expanduser())
    return trunk


def _home(backbone: str) -> str:
    """Returns the address that timm downloads the weights from."""
    config = timm.get_pretrained_cfg(backbone)
    return f"huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url or "for which timm has no address"


def _load_file(trunk: nn.Module, file: Path) -> None:
    classifier = f"{trunk.pretrained_cfg['classifier']}."  # type: ignore[index]
    weights = {name: value for name, value in _read(file).items() if not name.startswith(classifier)}
    own = trunk.state_dict()
    # Batch counters do not affect outputs, and older torchvision files lack them.
    missing = [name for name in own.keys() - weights.keys() if not name.endswith("num_batches_tracked")]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    problems = {"missing": missing, "unknown": weights.keys() - own.keys(), "other shape": shapes}
    found = [f"{what}: {listed(sorted(names), 5)}" for what, names in problems.items() if names]
    if found:
        _fail(f"{file} does not contain the weights of this backbone; {'; '.join(found)}.")
    trunk.load_state_dict(weights, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        _fail(f"pretrained={str(file)!r} is neither {TIMM!r} nor an existing file.")
    try:
        safe = file.suffix == ".safetensors"
        weights = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes cause nearly any exception
        reason = str(error).partition("\n")[0]
        _fail(f"{file} cannot be read as a weights file without running code from it: {reason}", error)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        _fail(f"{file} is not a plain mapping from names to tensors; save only the backbone's state_dict().")
    return weights


def _fail(message: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(f"{message}\n{WAYS}") from cause
