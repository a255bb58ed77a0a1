"""A fully trained ImageNet ResNet: the network of the BCE, ASL and CAP rows.

Sources: CAP's repository (xiemk/SSMLL-CAP) for what is trained and on which images; timm for the ResNet and its
ImageNet weights; "ML-Decoder: Scalable and Versatile Classification Head" (Ridnik et al., repository
Alibaba-MIIL/ML_Decoder) for the decoder head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, cast

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cbsa_lightning.clip.frozen import as_float
from cbsa_lightning.clip.loading import RANDOM
from cbsa_lightning.errors import ConfigError, WeightsError, listed
from cbsa_lightning.networks.attention import attend, multi_head_attention
from cbsa_lightning.networks.base import Description, Network, NetworkOutput

TIMM = "timm"  # the default of `pretrained`: the weights of the backbone's tag
WAYS = (
    "Ways to get weights: (1) where there is network access, timm downloads them once into the Hugging Face cache, and "
    "that cache (HF_HOME) can be copied to a machine without; (2) download the file elsewhere and give "
    "pretrained=<file>, a .safetensors of timm or a .pth of torchvision; (3) pretrained='random' for "
    "random weights, of use in tests only."
)


class Head(nn.Module):
    """Base of the heads: from the trunk's map to logits. Made by ``head(D, C)``; see :data:`HeadCallable`."""

    class_tensors: tuple[str, ...] | None = None  # see Network.class_tensors

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """Judges every class.

        Args:
            features: ``(B, D, h, w)``, the last map of the trunk.
            attention: Whether to give attention maps too, if the head has any.
        """
        raise NotImplementedError


HeadCallable = Callable[[int, int], Head]
"""Makes a head from D, the number of channels of the trunk's map, and C, the number of classes."""


class LinearHead(Head):
    """Global average pooling and one linear layer, as in CAP.

    Args:
        num_features: D, channels of the map.
        num_classes: C.
    """

    class_tensors = ("linear.weight", "linear.bias")

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """See :class:`Head`; there are no attention maps."""
        return NetworkOutput(self.linear(features.mean((2, 3))))


class CrossAttentionBlock(nn.Module):
    """The standard post-norm decoder block without self-attention, which can return its attention weights."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = multi_head_attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        """``queries (1, C, d)`` and ``tokens (B, HW, d)`` to features ``(B, C, d)`` and attention ``(B, C, HW)``."""
        seen, weights = attend(self.multihead_attn, queries, tokens, tokens, tokens.shape[0], attention)
        x = self.norm2(queries + self.dropout(seen))
        mixed = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(mixed)), weights


class MLDecoderHead(Head):
    """ML-Decoder as CAP uses it: one fixed random query a class looks at the map, and is read out by its own weights.

    One decoder block without self-attention, as the queries are the same for every image. Three things differ from the
    published code. There the place of self-attention is taken by ``x + dropout(x)``, which the norm behind it undoes
    up to the noise of dropout; here that norm alone remains, without the noise. Each class has a query of its own
    however many there are, which is CAP's setting; the published default shares 100 among more classes. And the
    read-out is one product with a ``(C, width)`` matrix, not a loop over classes.

    Args:
        num_features: D, channels of the map.
        num_classes: C.
        width: Channels of queries and tokens.
        heads: Attention heads; must divide ``width``.
        feedforward: Width of the block's hidden layer.
        dropout: Rate in attention and feed-forward.

    Raises:
        ConfigError: If ``heads`` does not divide ``width``.
    """

    class_tensors = ("queries", "weight", "bias")
    queries: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        width: int = 768,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(num_features, width)
        self.register_buffer("queries", torch.randn(num_classes, width))
        self.norm = nn.LayerNorm(width)
        # Nested so that checkpoints written when the head had a decoder of several blocks still load.
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList([CrossAttentionBlock(width, heads, feedforward, dropout)])}
        )
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, width)))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """See :class:`Head`; attention is the mean over heads, ``(B, C, h, w)``."""
        tokens = self.embed(features.flatten(2).transpose(1, 2)).relu()
        (block,) = cast(nn.ModuleList, self.decoder["layers"])
        found, maps = block(self.norm(self.queries)[None], tokens, attention)
        logits = (found * self.weight).sum(-1) + self.bias
        return NetworkOutput(logits, attention=None if maps is None else maps.unflatten(-1, features.shape[2:]))


class ImageNetNetwork(Network):
    """An ImageNet ResNet of timm with a head, all of it trained, BatchNorm statistics included.

    Nothing is frozen: :meth:`features` hands on the images, the trunk runs in :meth:`forward`, and neither a feature
    cache nor a labeler that needs frozen features can be used with it.

    Args:
        class_names: The C class names; only their number counts.
        backbone: Name of a timm model whose last map is ``(B, D, h, w)``, with the tag of its weights. The default is
            torchvision's first ImageNet ResNet-50, which CAP starts from.
        pretrained: "timm" for the weights of the tag, fetched by timm; a .safetensors or .pth file of weights, whose
            classifier is ignored; "random" for random weights.
        head: Makes the head: :class:`LinearHead`, :class:`MLDecoderHead`, or one with other settings.
        image_mean: Three channel means, for images in [0, 1]; None: 0. CAP does not normalize.
        image_std: Three channel deviations above 0, likewise; None: 1.

    Raises:
        ConfigError: If timm has no such model, or means and deviations are no three numbers.
        WeightsError: If the weights are not available or do not fit; lists the ways to get them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: str = "resnet50.tv_in1k",
        pretrained: str | None = TIMM,
        head: HeadCallable = LinearHead,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = _load_trunk(backbone, pretrained)
        self.head = head(_width(self.trunk), len(class_names))
        # Buffers that a checkpoint holds: weights go with the images that they were trained on.
        self.register_buffer("mean", _channels("image_mean", image_mean, 0.0))
        self.register_buffer("std", _channels("image_std", image_std, 1.0))
        if not bool((self.std > 0).all()):
            raise ConfigError(f"image_std must be three numbers above 0, got {image_std}")

    def class_tensors(self) -> set[str] | None:
        """Those of the head."""
        own = self.head.class_tensors
        return None if own is None else {f"head.{name}" for name in own}

    def features(self, images: Tensor) -> Tensor:
        """The images ``(B, 3, H, W)`` themselves, as floats in [0, 1]: no part of the tower is frozen.

        Args:
            images: uint8, or float in [0, 1].

        Raises:
            DataError: Another shape or type.
        """
        return as_float(images, self.mean.dtype)

    def describer(self) -> Callable[[Tensor], Description]:
        """There is none: before training, a tower that is trained has nothing to say that will stay true.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "ImageNetNetwork trains its whole tower, so there are no frozen features that labels could be made from "
            "before training: choose a labeler that works on each epoch's scores, such as "
            "cbsa_lightning.method.labelers.ClassDistributionAware, or a network with frozen towers."
        )

    def forward(self, features: Tensor, text: Any = None, *, attention: bool = False) -> NetworkOutput:
        """Trunk and head.

        Args:
            features: Images as :meth:`features` gives them.
            text: Not used; there is no text tower.
            attention: Whether to give the head's attention maps, if it has any.

        Raises:
            ConfigError: If the backbone gives no map.
        """
        found = self.trunk((features - self.mean) / self.std)
        width = _width(self.trunk)
        if found.ndim != 4 or found.shape[1] != width:
            raise ConfigError(
                f"the backbone {type(self.trunk).__name__} gives {tuple(found.shape)} where a map (B, {width}, h, w) "
                "is needed; choose a convolutional one, such as resnet50.tv_in1k"
            )
        return cast(NetworkOutput, self.head(found, attention))


def _width(trunk: nn.Module) -> int:
    return cast(int, trunk.num_features)


def _channels(name: str, values: Sequence[float] | None, default: float) -> Tensor:
    values = [default] * 3 if values is None else values
    if len(values) != 3:
        raise ConfigError(f"{name} must be three numbers, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def _load_trunk(backbone: str, pretrained: str | None) -> nn.Module:
    """The timm model without its classifier and pooling, with the weights that were asked for."""
    if pretrained is None:
        raise ConfigError(
            f"pretrained of backbone {backbone!r} is null, which names no weights. Give '{TIMM}' or a file, or "
            f"'{RANDOM}' for random weights."
        )
    names = [*timm.list_models(), *timm.list_pretrained()]
    if backbone not in names:
        near = get_close_matches(backbone, names, n=5)
        raise ConfigError(
            f"timm {timm.__version__} knows no model {backbone!r}" + (f"; near names: {listed(near)}" if near else "")
        )
    try:
        trunk: nn.Module = timm.create_model(backbone, pretrained=pretrained == TIMM, num_classes=0, global_pool="")
    except Exception as error:  # timm, the hub and torch raise many kinds
        if pretrained == TIMM:
            _fail(f"the ImageNet weights of {backbone}, {_home(backbone)}, could not be loaded: {error}", error)
        raise ConfigError(f"timm cannot build {backbone!r} without its classifier: {error}") from error
    if pretrained not in (RANDOM, TIMM):
        _load_file(trunk, Path(pretrained).expanduser())
    return trunk


def _home(backbone: str) -> str:
    """Where timm looks for the weights."""
    config = timm.get_pretrained_cfg(backbone)
    return f"huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url or "which timm has none of"


def _load_file(trunk: nn.Module, file: Path) -> None:
    classifier = f"{trunk.pretrained_cfg['classifier']}."  # type: ignore[index]
    weights = {name: value for name, value in _read(file).items() if not name.startswith(classifier)}
    own = trunk.state_dict()
    # Counters of batches go into no result; torchvision's older files lack them.
    missing = [name for name in own.keys() - weights.keys() if not name.endswith("num_batches_tracked")]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    problems = {"missing": missing, "unknown": weights.keys() - own.keys(), "other shape": shapes}
    found = [f"{what}: {listed(sorted(names), 5)}" for what, names in problems.items() if names]
    if found:
        _fail(f"{file} does not hold the weights of this backbone; {'; '.join(found)}.")
    trunk.load_state_dict(weights, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        _fail(f"pretrained={str(file)!r} is neither {TIMM!r} nor a file that is there.")
    try:
        safe = file.suffix == ".safetensors"
        weights = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        reason = str(error).partition("\n")[0]
        _fail(f"{file} is no file of weights that can be read without running code from it: {reason}", error)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        _fail(f"{file} holds no plain mapping from names to tensors; save the backbone's state_dict() alone.")
    return weights


def _fail(message: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(f"{message}\n{WAYS}") from cause
