"""What the networks with learnable prompts over a frozen CLIP share: CBSA and the systems it is compared with."""

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
    """Base: frozen towers, features below the attention pool, and parameter groups.

    Args:
        clip: The towers. Their image tower is brought into its fastest form, for good.
        prompt_names: The C class names, as they are to be read.
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
        """The prompt words, where each class has its own."""
        prompts = ((name, part) for name, part in self.named_modules() if isinstance(part, ClassPrompts))
        return {f"{name}.words" for name, part in prompts if not part.shared}

    @property
    def frozen_weights(self) -> str:
        """Fingerprint of the CLIP weights as they were loaded, and of how the tower uses them.

        The same weights give other features under another activation or number of heads, which no weight shows.
        """
        tower = self.clip.tower
        heads = [f"{name} {m.num_heads}" for name, m in tower.named_modules() if hasattr(m, "num_heads")]
        return hashlib.sha256("\n".join([self.clip.fingerprint, repr(tower), *heads]).encode()).hexdigest()

    def features(self, images: Tensor) -> Tensor:
        """Frozen features below the attention pool; see :meth:`FrozenCLIP.features`."""
        return self.clip.features(images)

    def describer(self, keep: bool = False) -> Describer:
        """Mean of the frozen features, CLIP's global feature, and zero-shot scores: the cosine with "a photo of a ...".

        All of the towers as they are now: before training the pool is CLIP's own.

        Args:
            keep: Whether the description stays as it is when the pool is trained.
        """
        pool = copy.deepcopy(self.clip.pool).requires_grad_(False) if keep else self.clip.pool
        return Describer(pool, nn.functional.normalize(self.zero_shot_text().float(), dim=-1))

    def zero_shot_text(self) -> Tensor:
        """Text features ``(C, d)`` of "a photo of a ...", without gradients; not normalized."""
        return self.clip.encode_texts([f"a photo of a {name}." for name in self.prompt_names])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The attention pool, if trained, in a group of its own with its factor of the learning rate."""
        return parameter_groups(self, self.clip.pool, self.pool_lr_scale)


class Describer(nn.Module):
    """Descriptions of images by an attention pool and by text features ``(C, d)``."""

    text: Tensor

    def __init__(self, pool: nn.Module, text: Tensor) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("text", text)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Description:
        """Describes frozen features."""
        # In full precision: zero-shot scores of two images differ by little more than half precision holds.
        with torch.autocast(features.device.type, enabled=False):
            dtype = next(self.pool.parameters()).dtype
            g = nn.functional.normalize(self.pool(features.to(dtype)).g.float(), dim=-1)
            return Description([mean_over_places(features), g], [g @ self.text.T])


def parameter_groups(network: nn.Module, part: nn.Module, scale: float) -> list[dict[str, Any]]:
    """Groups of trainable parameters: those of a ``part`` of the network, if any, under their own factor."""
    scaled = [p for p in part.parameters() if p.requires_grad]
    taken = {id(p) for p in scaled}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": rest, "lr_scale": 1.0}]
    return [*groups, {"params": scaled, "lr_scale": scale}] if scaled else groups


def cosines(images: Tensor, text: Tensor) -> Tensor:
    """Cosine ``(..., C)`` of image features ``(..., d)`` with every class ``(C, d)``; float32 whatever the autocast."""
    with torch.autocast(images.device.type, enabled=False):
        x, t = (nn.functional.normalize(v.float(), dim=-1) for v in (images, text))
        return x @ t.T


def region_maps(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weights of the places ``(B, h * w, C)`` as attention maps ``(B, C, h, w)``, each of which sums to 1."""
    maps = weights / weights.sum(1, keepdim=True)
    return maps.transpose(1, 2).reshape(maps.shape[0], -1, *grid)
