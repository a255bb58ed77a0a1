"""Loading of timm trunks with ImageNet weights, with weights from a file, or with random weights."""

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

TIMM = "timm"  # the default of `pretrained`, which selects the weights of the backbone's tag
WAYS = (
    "Ways to obtain weights: (1) with network access, timm downloads them once into the Hugging Face cache (HF_HOME), "
    "which can be copied to a machine without network access; (2) download the file on another machine and set "
    "pretrained=<file>, a .safetensors file of timm or a .pth file of torchvision; (3) set pretrained='random' for "
    "random weights, which are useful only in tests."
)


def width(trunk: nn.Module) -> int:
    """Returns D, the number of channels of a trunk's last map."""
    return cast(int, trunk.num_features)


def channels(name: str, values: Sequence[float] | None, default: float) -> Tensor:
    """Returns three channel statistics as ``(1, 3, 1, 1)``.

    Raises:
        ConfigError: If the values are not three numbers. The message contains the argument's ``name``.
    """
    values = [default] * 3 if values is None else values
    if len(values) != 3:
        raise ConfigError(f"{name} must be three numbers, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def load_trunk(backbone: str, pretrained: str | None) -> nn.Module:
    """Returns the timm model without its classifier and pooling, with the requested weights.

    Args:
        backbone: Name of a timm model, including the tag of its weights.
        pretrained: "timm" for the weights of the tag, a weights file, or "random".

    Raises:
        ConfigError: If timm does not have the model.
        WeightsError: If the weights are missing or do not match the model. The message explains how to get them.
    """
    if pretrained is None:
        raise ConfigError(
            f"pretrained of backbone {backbone!r} is null, which does not specify any weights. Give '{TIMM}', a file, "
            f"or '{RANDOM}' for random weights."
        )
    names = [*timm.list_models(), *timm.list_pretrained()]
    if backbone not in names:
        near = get_close_matches(backbone, names, n=5)
        raise ConfigError(
            f"timm {timm.__version__} does not have a model {backbone!r}"
            + (f"; similar names: {listed(near)}" if near else "")
        )
    try:
        trunk: nn.Module = timm.create_model(backbone, pretrained=pretrained == TIMM, num_classes=0, global_pool="")
    except Exception as error:  # timm, the hub and torch raise many types of exceptions
        if pretrained == TIMM:
            _fail(f"the ImageNet weights of {backbone}, {_home(backbone)}, could not be loaded: {error}", error)
        raise ConfigError(f"timm cannot build {backbone!r} without a classifier: {error}") from error
    if pretrained not in (RANDOM, TIMM):
        _load_file(trunk, Path(pretrained).expanduser())
    return trunk


def _home(backbone: str) -> str:
    """Returns the address from which timm downloads the weights."""
    config = timm.get_pretrained_cfg(backbone)
    return f"huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url or "for which timm has no address"


def _load_file(trunk: nn.Module, file: Path) -> None:
    classifier = f"{trunk.pretrained_cfg['classifier']}."  # type: ignore[index]
    weights = {name: value for name, value in _read(file).items() if not name.startswith(classifier)}
    own = trunk.state_dict()
    # Older torchvision files lack the batch counters, which do not affect the outputs.
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
    except Exception as error:  # damaged files can cause almost any exception
        reason = str(error).partition("\n")[0]
        _fail(f"{file} cannot be read as a weights file with weights_only=True: {reason}", error)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        _fail(f"{file} does not contain a plain mapping from names to tensors; save only the backbone's state_dict().")
    return weights


def _fail(message: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(f"{message}\n{WAYS}") from cause
