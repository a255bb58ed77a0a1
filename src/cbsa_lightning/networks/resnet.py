"""A fully trained ImageNet ResNet, the network of the rows BCE, ASL and CAP.

Sources: CAP's repository (xiemk/SSMLL-CAP) for the layers and the preprocessing of images; timm for the ResNet and its
ImageNet weights; "ML-Decoder: Scalable and Versatile Classification Head" (Ridnik et al., repository
Alibaba-MIIL/ML_Decoder) for the decoder head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.clip.frozen import as_float
from cbsa_lightning.dropout import Dropout
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.attention import attend, multi_head_attention
from cbsa_lightning.networks.base import Description, Network, NetworkOutput
from cbsa_lightning.networks.imagenet_weights import TIMM, channels, load_trunk, width


class Head(nn.Module):
    """Base class of the heads, which compute logits from the output of the trunk. See :data:`HeadCallable`."""

    class_tensors: tuple[str, ...] | None = None  # see Network.class_tensors

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """Computes the logits.

        Args:
            features: ``(B, D, h, w)``, the last map of the trunk.
            attention: Whether to also return attention maps, if the head has any.
        """
        raise NotImplementedError


HeadCallable = Callable[[int, int], Head]
"""Type of a function that creates a head from D, the number of channels of the map, and C, the number of classes."""


class LinearHead(Head):
    """Global average pooling and a linear layer, as in CAP.

    Args:
        num_features: D, the number of channels of the map.
        num_classes: C.
    """

    class_tensors = ("linear.weight", "linear.bias")

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """Computes the logits; see :class:`Head`. There are no attention maps."""
        return NetworkOutput(self.linear(features.mean((2, 3))))


class CrossAttentionBlock(nn.Module):
    """Standard post-norm decoder block without self-attention. It can return its attention weights."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = multi_head_attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        """Computes features ``(B, C, d)`` and attention ``(B, C, HW)``.

        Args:
            queries: ``(1, C, d)``.
            tokens: ``(B, HW, d)``.
            attention: Whether to return the attention.
        """
        seen, weights = attend(self.multihead_attn, queries, tokens, tokens, tokens.shape[0], attention)
        x = self.norm2(queries + self.dropout(seen))
        mixed = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(mixed)), weights


class MLDecoderHead(Head):
    """ML-Decoder as used by CAP. Each class has a fixed random query, which attends to the map, and its own weights.

    The head has one decoder block without self-attention, since the queries are the same for every image. It differs
    from the published code in three ways. First, the published code replaces self-attention with ``x + dropout(x)``,
    which the following norm reduces to dropout noise; here, only the norm remains. Second, each class always has its
    own query, as in CAP, whereas the published default shares 100 queries if there are more classes. Third, the logits
    are computed as one product with a ``(C, width)`` matrix instead of a loop over classes.

    Args:
        num_features: D, the number of channels of the map.
        num_classes: C.
        width: Number of channels of queries and tokens.
        heads: Number of attention heads. It must divide ``width``.
        feedforward: Width of the block's hidden layer.
        dropout: Dropout rate in the attention and feed-forward layers.

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
        # The nesting keeps checkpoints of versions with several decoder blocks loadable.
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList([CrossAttentionBlock(width, heads, feedforward, dropout)])}
        )
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, width)))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor, attention: bool = False) -> NetworkOutput:
        """Computes the logits; see :class:`Head`. The attention ``(B, C, h, w)`` is the mean over the heads."""
        tokens = self.embed(features.flatten(2).transpose(1, 2)).relu()
        (block,) = cast(nn.ModuleList, self.decoder["layers"])
        found, maps = block(self.norm(self.queries)[None], tokens, attention)
        logits = (found * self.weight).sum(-1) + self.bias
        return NetworkOutput(logits, attention=None if maps is None else maps.unflatten(-1, features.shape[2:]))


class ImageNetNetwork(Network):
    """A timm ImageNet ResNet with a head. All layers are trained, including the BatchNorm statistics.

    No part is frozen: :meth:`features` returns the images, and the trunk runs in :meth:`forward`. The network therefore
    supports neither a feature cache nor a labeler that needs frozen features.

    Args:
        class_names: The C class names; only their number is used.
        backbone: Name of a timm model whose last map is ``(B, D, h, w)``, including the tag of its weights. The default
            is torchvision's first ImageNet ResNet-50, which CAP is initialized with.
        pretrained: "timm" for the weights of the tag, which timm downloads; a .safetensors or .pth weights file, whose
            classifier is ignored; or "random" for random weights.
        head: Class or function that creates the head, such as :class:`LinearHead` or :class:`MLDecoderHead`.
        image_mean: Three channel means for images in [0, 1]; None uses 0, since CAP does not normalize images.
        image_std: Three channel standard deviations above 0; None uses 1.

    Raises:
        ConfigError: If timm does not have the model, or the means or standard deviations are not three numbers.
        WeightsError: If the weights are missing or do not match the model. The message explains how to get them.
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
        self.trunk = load_trunk(backbone, pretrained)
        self.head = head(width(self.trunk), len(class_names))
        # Checkpoints include these buffers, because the weights were trained with this normalization.
        self.register_buffer("mean", channels("image_mean", image_mean, 0.0))
        self.register_buffer("std", channels("image_std", image_std, 1.0))
        if not bool((self.std > 0).all()):
            raise ConfigError(f"image_std must be three numbers above 0, got {image_std}")

    def class_tensors(self) -> set[str] | None:
        """Names of the head's class tensors."""
        own = self.head.class_tensors
        return None if own is None else {f"head.{name}" for name in own}

    def features(self, images: Tensor) -> Tensor:
        """Returns the images ``(B, 3, H, W)`` as floats in [0, 1], since no part of the network is frozen.

        Args:
            images: uint8, or float in [0, 1].

        Raises:
            DataError: If the shape or type is wrong.
        """
        return as_float(images, self.mean.dtype)

    def describer(self) -> Callable[[Tensor], Description]:
        """Raises an error, since a network without frozen layers has no frozen features.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "ImageNetNetwork trains its whole backbone, so there are no frozen features from which labels could be "
            "computed before training. Choose a labeler that uses the scores of each epoch, such as "
            "cbsa_lightning.method.labelers.ClassDistributionAware, or a network with frozen towers."
        )

    def forward(self, features: Tensor, text: Any = None, *, attention: bool = False) -> NetworkOutput:
        """Runs the trunk and the head.

        Args:
            features: Output of :meth:`features`.
            text: Ignored, since there is no text tower.
            attention: Whether to also return the head's attention maps, if it has any.

        Raises:
            ConfigError: If the output of the backbone is not a map.
        """
        found = self.trunk((features - self.mean) / self.std)
        channels_out = width(self.trunk)
        if found.ndim != 4 or found.shape[1] != channels_out:
            raise ConfigError(
                f"the backbone {type(self.trunk).__name__} returns a tensor of shape {tuple(found.shape)}, but a map "
                f"(B, {channels_out}, h, w) is required; choose a convolutional one, such as resnet50.tv_in1k"
            )
        return cast(NetworkOutput, self.head(found, attention))
