"""Loading of an open_clip model and its weights from a name, folder or file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from cbsa_lightning.clip import embedded
from cbsa_lightning.errors import ConfigError, WeightsError, listed

CONFIG_NAME = "open_clip_config.json"
LOCAL, HUB = "local-dir:", "hf-hub:"
EMBEDDED = "embedded"  # the small model that is included in this package
OWN = "openai"  # the default of `pretrained`; folders and hub models then use their own weights
RANDOM = "random"  # value of `pretrained` that requests random weights
_TOKENIZER_KEYS = {"hf_tokenizer_name", "tokenizer_kwargs"}

WAYS = (
    "Ways to obtain weights: (1) with network access, a tag is downloaded once into the Hugging Face cache (HF_HOME), "
    "which can be copied to a machine without network access; (2) download the weights file on another machine and set "
    "pretrained=<file>; (3) set model=<folder>, where the folder contains open_clip_config.json and the weights file; "
    "(4) set pretrained='random' for random weights, which are useful only in tests."
)


@dataclass(frozen=True)
class Loaded:
    """An open_clip model with its tokenizer and image statistics."""

    clip: nn.Module
    tokenizer: Callable[..., Tensor]
    name: str
    weights: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@dataclass(frozen=True)
class _Architecture:
    """An open_clip config, with its image statistics and its open_clip identifier if they exist."""

    config: dict[str, Any]
    preprocess: dict[str, Any]
    identifier: str | None = None

    @property
    def builtin(self) -> bool:
        return self.identifier is not None and not self.brings_weights

    @property
    def brings_weights(self) -> bool:
        return self.identifier is not None and self.identifier.startswith((LOCAL, HUB))


def load_open_clip(
    model: str,
    pretrained: str | None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Loaded:
    """Builds an open_clip model. See ``FrozenCLIP.load`` for the arguments and errors."""
    if pretrained is None:
        raise ConfigError(
            f"pretrained of CLIP {model!r} is null, which does not specify any weights. Omit it to use the weights of "
            f"a folder, or give a tag, a file, or '{RANDOM}' for random weights."
        )
    if torch.get_default_device().type == "meta":
        raise ConfigError(
            "torch's default device is 'meta', whose tensors have no values. Use 'cpu' as the default device when you "
            "build the network."
        )
    asked, pretrained = pretrained, None if pretrained == RANDOM else pretrained
    architecture = _architecture(model)
    file = Path(pretrained).expanduser() if pretrained is not None else None
    file = file if file is not None and file.is_file() else None
    if file is not None:
        _check_file(architecture, file)
        architecture = replace(
            architecture, preprocess=_preprocess_beside(file, architecture.config) or architecture.preprocess
        )
        if architecture.builtin and not architecture.preprocess and not (image_mean and image_std):
            warnings.warn(
                f"The known weights of {model} have different image means and standard deviations, and {file} does not "
                "specify which ones to use. CLIP's are used. To be sure, set image_mean and image_std.",
                stacklevel=3,
            )
    elif pretrained is not None and not (architecture.brings_weights and pretrained == OWN):
        _check_tag(architecture, pretrained)
    try:
        with _identifier(architecture, file) as identifier:
            clip = open_clip.create_model(
                identifier,
                pretrained=pretrained if identifier == architecture.identifier and architecture.builtin else None,
                load_weights=pretrained is not None,
                require_pretrained=pretrained is not None,
                pretrained_text=False,
            )
            special = not architecture.config or _TOKENIZER_KEYS & architecture.config["text_cfg"].keys()
            # CLIP's own tokenizer is a shared function, so it does not need to be created, copied or pickled.
            tokenizer = open_clip.get_tokenizer(identifier) if special else open_clip.tokenize
    except Exception as error:  # open_clip, the hub and torch raise many types of exceptions
        if pretrained is None:
            raise ConfigError(f"open_clip cannot build model {model!r}: {error}") from error
        raise WeightsError(
            f"weights {pretrained!r} could not be loaded into model {model!r}: {error}\n{WAYS}"
        ) from error
    preprocess: dict[str, Any] = clip.visual.preprocess_cfg
    return Loaded(
        clip=clip,
        tokenizer=tokenizer,
        name=f"{model}/{asked}",
        weights=_origin(architecture, asked, file),
        image_mean=_three("image_mean", image_mean or preprocess["mean"]),
        image_std=_three("image_std", image_std or preprocess["std"]),
    )


def _origin(architecture: _Architecture, pretrained: str, file: Path | None) -> str:
    """Returns a description of the source of the weights."""
    if pretrained == RANDOM:
        return "random"
    if file is not None:
        return str(file)
    return str(architecture.identifier).removeprefix(LOCAL) if architecture.brings_weights else f"tag {pretrained!r}"


def _architecture(model: str) -> _Architecture:
    if model == EMBEDDED:
        return _architecture(f"{LOCAL}{embedded.folder()}")
    name = model.replace("/", "-")
    if name in open_clip.list_models():
        config = _supported(open_clip.get_model_config(name), name)
        return _Architecture(config, _tag_preprocess(name), name)
    if model.startswith(HUB):
        return _Architecture({}, {}, model)
    path = Path(model.removeprefix(LOCAL)).expanduser()
    if path.is_dir():
        return _Architecture(*_read_config(path / CONFIG_NAME), f"{LOCAL}{path}")
    if path.suffix == ".json" and path.is_file():
        config, preprocess = _read_config(path)
        return _Architecture(config, preprocess or _preprocess_beside(path, config))
    near = get_close_matches(name, open_clip.list_models(), n=5)
    raise ConfigError(
        f"CLIP model {model!r} is neither a model name of open_clip {open_clip.__version__}, nor a folder, a JSON "
        f"config file, or 'embedded'{'; similar names: ' + listed(near) if near else ''}"
    )


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads (model config, preprocessing) from a JSON file in open_clip's flat or nested format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path.parent}: the folder of a CLIP model must contain {path.name}, which does not exist"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the file is not a readable JSON config: {error}") from error
    content = content if isinstance(content, dict) else {}
    config = content.get("model_cfg", content)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ConfigError(f"{path}: the file is not an open_clip model config, since it lacks {listed(missing)}")
    return _supported(config, str(path)), content.get("preprocess_cfg", {})


def _supported(config: dict[str, Any], where: str) -> dict[str, Any]:
    if config["text_cfg"].get("hf_model_name") or "multimodal_cfg" in config:
        raise ConfigError(
            f"{where}: the text tower is a Hugging Face or multimodal model; prompts can be learned only through "
            "a causal open_clip text transformer"
        )
    return config


def _preprocess_beside(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing from an open_clip_config.json next to ``file`` if its architecture is the same."""
    sibling = file.parent / CONFIG_NAME
    if not sibling.is_file():
        return {}
    its_config, preprocess = _read_config(sibling)
    return preprocess if its_config == config else {}


def _tag_preprocess(name: str) -> dict[str, Any]:
    """Returns the image statistics that all tags of a model name share, or an empty dict if they differ."""
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    statistics = {(tag["mean"], tag["std"]) for tag in tags}
    statistics = statistics or {(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)}
    return dict(zip(("mean", "std"), statistics.pop(), strict=True)) if len(statistics) == 1 else {}


def _check_tag(architecture: _Architecture, pretrained: str) -> None:
    name = architecture.identifier
    if not architecture.builtin:
        raise WeightsError(
            f"pretrained={pretrained!r} is not a file, and tags exist only for open_clip's own model names. Give a "
            f"weights file, or '{RANDOM}' for random weights. {WAYS}"
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        raise WeightsError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {name}. Tags of this model: "
            f"{listed(open_clip.list_pretrained_tags_by_model(name)) or 'none'}. {WAYS}"
        )
    if tag.get("quick_gelu", False) != architecture.config.get("quick_gelu", False):
        needed = "QuickGELU" if tag.get("quick_gelu", False) else "plain GELU"
        raise ConfigError(
            f"weights {pretrained!r} were trained with {needed}, but model {name} does not use it, so its features "
            f"would silently be wrong. Use the model name {'with' if 'Quick' in needed else 'without'} "
            "'-quickgelu'."
        )


def _check_file(architecture: _Architecture, file: Path) -> None:
    """Rejects QuickGELU weights for a plain-GELU config, and warns if the file does not reveal its variant."""
    if architecture.identifier is not None and architecture.identifier.startswith(HUB):
        raise ConfigError(f"model {architecture.identifier} has its own weights, so {file} cannot be used with it")
    if architecture.config.get("quick_gelu", False):
        return
    name, sibling = architecture.identifier or "", file.parent / CONFIG_NAME
    if _is_torchscript(file) or (sibling.is_file() and _read_config(sibling)[0].get("quick_gelu", False)):
        raise ConfigError(
            f"{file}: the weights were trained with QuickGELU (according to OpenAI's archive or the {CONFIG_NAME} in "
            f"this folder), but model {name or 'config'} uses plain GELU, so its features would silently be wrong. Use "
            "the model name with '-quickgelu', or set \"quick_gelu\": true in the config."
        )
    if f"{name}-quickgelu" in open_clip.list_models():
        warnings.warn(
            f"{file} does not specify its GELU variant, and model {name} uses plain GELU. If the weights are "
            f"OpenAI's, MetaCLIP's or DFN's, use {name}-quickgelu; otherwise, the features would silently be wrong.",
            stacklevel=4,
        )


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


@contextmanager
def _identifier(architecture: _Architecture, file: Path | None) -> Iterator[str]:
    """Yields the identifier to request from open_clip.

    If the user specifies a config or weights file, it is converted to a temporary folder in open_clip's format. All
    sources can then be loaded in the same way, without changing open_clip's registry of names.
    """
    if file is None and architecture.identifier is not None:
        yield architecture.identifier
        return
    with tempfile.TemporaryDirectory() as folder:
        if file is not None:
            _stage(file, Path(folder))
        content = {"model_cfg": architecture.config, "preprocess_cfg": architecture.preprocess}
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(content), encoding="utf-8")
        yield f"{LOCAL}{folder}"


def _stage(file: Path, folder: Path) -> None:
    """Links or copies a weights file to the path that open_clip expects."""
    if _is_torchscript(file):  # an archive from OpenAI, which open_clip's safe loading rejects
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is only used to read tensors
            state = torch.jit.load(str(file), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        sizes = ("input_resolution", "context_length", "vocab_size")
        weights = {name: value for name, value in state.items() if name not in sizes}
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
        return
    kind = "model.safetensors" if file.suffix == ".safetensors" else "pytorch_model.bin"
    try:
        os.symlink(file.resolve(), folder / f"open_clip_{kind}")
    except OSError:
        shutil.copyfile(file, folder / f"open_clip_{kind}")


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3 or (name == "image_std" and min(values) <= 0):
        raise ConfigError(f"{name} must be three numbers{' above 0' if name == 'image_std' else ''}, got {values}")
    return float(values[0]), float(values[1]), float(values[2])
