"""TaI-DPT: one prompt per class for the whole image, and another one for its places (Guo et al., CVPR 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.prompted import LearnedPrompts, cosines, region_maps
from cbsa_lightning.networks.prompts import encode_prompt_sets


class GrainedText(NamedTuple):
    """Text features, each ``(C, d)``, for the whole image (``coarse``) and for its places (``fine``)."""

    coarse: Tensor
    fine: Tensor


class TaI(LearnedPrompts):
    """TaI-DPT, with one prompt for the global feature and another for the places that match best.

    The logit is the scaled mean of two cosines: that of the global feature, and that of the places, which are weighted
    by a softmax over the places.

    Source: repository guozix/TaI-DPT. As in the source, global and local features do not include positions, and the
    local features are computed with the value path. The original trains its prompts on captions instead of images, with
    a ranking loss for each granularity. The paper combines TaI with CAP, so both prompts are trained on labeled and
    pseudo-labeled images, with ASL on the combined logit and without captions. Since ASL requires a probability, the
    scale is learned with an initial value of 20 (a constant 4 in TaI), and prompts are class-specific.

    Args:
        prompt_names: The C class names to use in prompts.
        region_scale: Factor of the cosines in the softmax over places. The default is TaI's value for images. TaI uses
            50 for captions and 4 on NUS-WIDE.
        scale: Initial factor of the cosines in the logit.
        learn_scale: Whether this factor is learned.
        **clip_and_prompts: ``clip``, ``pretrained``, ``prompt_length`` and ``shared_prompts``; see
            :class:`~cbsa_lightning.networks.prompted.LearnedPrompts`.

    Raises:
        ConfigError: If the settings are not compatible with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self,
        prompt_names: Sequence[str],
        region_scale: float = 40.0,
        scale: float = 20.0,
        learn_scale: bool = True,
        **clip_and_prompts: Any,
    ) -> None:
        super().__init__(prompt_names, **clip_and_prompts)
        self.global_prompts = self.new_prompts()
        self.local_prompts = self.new_prompts()
        self.region_scale = region_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)

    def encode_text(self) -> GrainedText:
        """Encodes both prompts in one pass through the text tower."""
        return GrainedText(*encode_prompt_sets(self.clip, [self.global_prompts, self.local_prompts]))

    def forward(self, features: Tensor, text: GrainedText | None = None, *, attention: bool = False) -> NetworkOutput:
        """Computes the logits; see :class:`Network`."""
        text = text if text is not None else self.encode_text()
        coarse = cosines(self.clip.pool(features, positions=False).g, text.coarse)  # (B, C)
        places = self.clip.pool.values(features, positions=False)
        similarity = cosines(places.l, text.fine)  # (B, hw, C)
        weights = (self.region_scale * similarity).softmax(1)
        fine = (weights * similarity).sum(1)
        logits = self.log_scale.exp() * (coarse + fine) / 2
        return NetworkOutput(logits, None, region_maps(weights, places.grid) if attention else None)
