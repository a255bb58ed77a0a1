"""An ImageNet ResNet whose last stage is trained and whose other stages are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from cbsa_lightning.clip.frozen import as_float, fingerprint
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.imagenet_weights import channels, load_trunk, width

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PartlyFrozenResNet(nn.Module):
    """A timm ResNet. The stem and stages 1 to 3 are frozen, including their batch norms; stage 4 is trained.

    Args:
        backbone: Name of a timm ResNet, including the tag of its weights.
        pretrained: "timm" for the weights of the tag, a weights file, or "random".
        image_mean: Three channel means for images in [0, 1].
        image_std: Three channel standard deviations above 0.

    Attributes:
        width: Number of channels of the last map.

    Raises:
        ConfigError: If timm does not have the model, or the model is not a ResNet with four stages.
        WeightsError: If the weights are not available.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        pretrained: str | None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        trunk: Any = load_trunk(backbone, pretrained)
        parts = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")
        if missing := [name for name in parts if not hasattr(trunk, name)]:
            raise ConfigError(
                f"{backbone} does not have {', '.join(missing)}: the backbone must be a ResNet. Choose one, such as "
                "resnet101.tv_in1k."
            )
        self.frozen = nn.ModuleDict({name: getattr(trunk, name) for name in parts[:-1]}).requires_grad_(False)
        self.last: nn.Module = trunk.layer4
        self.width = width(trunk)
        self.register_buffer("mean", channels("image_mean", image_mean, 0.0))
        self.register_buffer("std", channels("image_std", image_std, 1.0))
        self.train()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of everything that :meth:`features` depends on."""
        return fingerprint(nn.ModuleDict({"frozen": self.frozen})) + str(self.mean.tolist() + self.std.tolist())

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the trained stage. The frozen stages stay in evaluation mode."""
        super().train(mode)
        self.frozen.train(False)
        return self

    def features(self, images: Tensor) -> Tensor:
        """Returns the map ``(B, c, H / 16, W / 16)`` of stage 3, without gradients. Images are uint8 or in [0, 1]."""
        with torch.no_grad():
            x = (as_float(images, self.mean.dtype) - self.mean) / self.std
            for part in self.frozen.values():
                x = part(x)
        return x

    def forward(self, features: Tensor) -> Tensor:
        """Computes the map ``(B, D, h, w)`` of the last stage from the output of :meth:`features`."""
        return cast(Tensor, self.last(features.to(self.mean.dtype)))
