"""Base classes and functions of the networks that learn prompts for a frozen CLIP."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.networks.base import Description, Network, mean_over_places
from cbsa_lightning.networks.prompts import ClassPrompts

if TYPE_CHECKING:
    from cbsa_lightning.clip import FrozenCLIP


class PromptedCLIP(Network):
    """Base class of networks with a frozen CLIP. It provides the frozen features and the parameter groups.

    Args:
        clip: The towers. Batch norms of the image tower are folded permanently; see :meth:`FrozenCLIP.speed_up`.
        prompt_names: The C class names to use in prompts.
        train_pool: Whether CLIP's attention pool is trained.
        pool_lr_scale: Factor of the learning rate for the attention pool.
    """

    def __init__(
        self, clip: FrozenCLIP, prompt_names: Sequence[str], train_pool: bool = False, pool_lr_scale: float = 0.1
    ) -> None:
        super().__init__()
        self.clip = clip
        self.prompt_names = list(prompt_names)
        self.pool_lr_scale = pool_lr_scale
        clip.pool.requires_grad_(train_pool)
        clip.speed_up()

    def _prompts(self, length: int, shared: bool, template: str | None = None, trainable: bool = True) -> ClassPrompts:
        check_number("prompt_length", length, 1, whole=True)
        check_flags(shared_prompts=shared)
        return ClassPrompts(self.clip, self.prompt_names, length, shared, template, trainable)

    def class_tensors(self) -> set[str]:
        """Names of the prompt words, unless all classes share one set."""
        prompts = ((name, part) for name, part in self.named_modules() if isinstance(part, ClassPrompts))
        return {f"{name}.words" for name, part in prompts if not part.shared}

    @property
    def frozen_weights(self) -> str:
        """Fingerprint of the loaded CLIP weights and the structure of the tower.

        The structure is included because features also depend on the activation and the number of heads.
        """
        tower = self.clip.tower
        heads = [f"{name} {m.num_heads}" for name, m in tower.named_modules() if hasattr(m, "num_heads")]
        return hashlib.sha256("\n".join([self.clip.fingerprint, repr(tower), *heads]).encode()).hexdigest()

    def features(self, images: Tensor) -> Tensor:
        """Computes the frozen features below the attention pool; see :meth:`FrozenCLIP.features`."""
        return self.clip.features(images)

    def describer(self, keep: bool = False) -> Describer:
        """Returns a module that computes mean frozen features, CLIP's global feature, and zero-shot scores.

        Zero-shot scores are the cosines of CLIP's global feature and "a photo of a ...". The module uses the current
        weights of the towers. Before training, the pool has the weights of CLIP.

        Args:
            keep: Whether to copy the pool, so that training the pool does not change the descriptions.
        """
        pool = copy.deepcopy(self.clip.pool).requires_grad_(False) if keep else self.clip.pool
        return Describer(pool, nn.functional.normalize(self.zero_shot_text().float(), dim=-1))

    def zero_shot_text(self) -> Tensor:
        """Returns text features ``(C, d)`` of "a photo of a ...", without gradients. They are not normalized."""
        return self.clip.encode_texts([f"a photo of a {name}." for name in self.prompt_names])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns parameter groups. A trained attention pool has its own group and learning-rate factor."""
        return parameter_groups(self, self.clip.pool, self.pool_lr_scale)


class LearnedPrompts(PromptedCLIP):
    """Base class of the compared systems, which have a frozen CLIP and learned prompts of equal length.

    Args:
        prompt_names: The C class names to use in prompts.
        clip: open_clip model name, folder or configuration file, or "embedded" for the small model in this package.
        pretrained: Weights tag of open_clip, a weights file, or "random". Omit it for folders, which contain weights.
        prompt_length: N, the number of learnable words per prompt.
        shared_prompts: Whether all classes share one set of learnable words.

    Raises:
        ConfigError: If the settings are not compatible with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self,
        prompt_names: Sequence[str],
        clip: str = "RN50-quickgelu",
        pretrained: str | None = "openai",
        prompt_length: int = 16,
        shared_prompts: bool = False,
    ) -> None:
        from cbsa_lightning.clip import FrozenCLIP  # open_clip takes seconds to import

        super().__init__(FrozenCLIP.load(clip, pretrained), prompt_names)
        self.prompt_length, self.shared_prompts = prompt_length, shared_prompts

    def new_prompts(self) -> ClassPrompts:
        """Returns trainable prompts, initialized with noise."""
        return self._prompts(self.prompt_length, self.shared_prompts)


class Describer(nn.Module):
    """Computes a :class:`Description` of images with an attention pool and text features ``(C, d)``."""

    text: Tensor

    def __init__(self, pool: nn.Module, text: Tensor) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("text", text)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Description:
        """Computes the description of frozen features."""
        # Zero-shot scores of two images differ by little more than the precision of float16, so float32 is used.
        with torch.autocast(features.device.type, enabled=False):
            dtype = next(self.pool.parameters()).dtype
            g = nn.functional.normalize(self.pool(features.to(dtype)).g.float(), dim=-1)
            return Description([mean_over_places(features), g], [g @ self.text.T])


def parameter_groups(network: nn.Module, part: nn.Module, scale: float) -> list[dict[str, Any]]:
    """Returns groups of trainable parameters. Those of ``part`` have the learning-rate factor ``scale``."""
    scaled = [p for p in part.parameters() if p.requires_grad]
    taken = {id(p) for p in scaled}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": rest, "lr_scale": 1.0}]
    return [*groups, {"params": scaled, "lr_scale": scale}] if scaled else groups


def cosines(images: Tensor, text: Tensor) -> Tensor:
    """Returns the cosines ``(..., C)`` of image features ``(..., d)`` and classes ``(C, d)``, always in float32."""
    with torch.autocast(images.device.type, enabled=False):
        x, t = (nn.functional.normalize(v.float(), dim=-1) for v in (images, text))
        return x @ t.T


def region_maps(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshapes weights of places ``(B, h * w, C)`` to attention maps ``(B, C, h, w)``. The sum of each map is 1."""
    maps = weights / weights.sum(1, keepdim=True)
    return maps.transpose(1, 2).reshape(maps.shape[0], -1, *grid)
