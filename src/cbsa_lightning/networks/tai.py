"""TaI-DPT: one prompt per class for the whole image and one for its places (Guo et al., CVPR 2023)."""

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
    """Text features to compare with the whole image (``coarse``) and its places (``fine``), each ``(C, d)``."""

    coarse: Tensor
    fine: Tensor


class TaI(LearnedPrompts):
    """Two granularities: one prompt for the global feature, and another for the best-matching places.

    The logit is the scaled mean of the global cosine and of the places' cosines, weighted by a softmax over the places.

    Source: repository guozix/TaI-DPT. As in it, global and local features have no positions, and the local ones use the
    value path. The original trains its prompts on captions instead of images, with a ranking loss for each granularity.
    The paper combines it with CAP instead, so here both prompts are trained on labeled and pseudo-labeled images, with
    ASL on the merged logit and without captions. Since ASL needs a probability, the scale starts at 20 and is learned
    (TaI: a constant 4), and prompts are class-specific.

    Args:
        prompt_names: The C class names as used in prompts.
        region_scale: Factor of the cosines in the softmax over places. The default is TaI's for images (50 for
            captions; 4 on NUS-WIDE).
        scale: Initial factor of the cosines in the logit.
        learn_scale: Whether that factor is learned.
        **clip_and_prompts: ``clip``, ``pretrained``, ``prompt_length`` and ``shared_prompts``, see
            :class:`~cbsa_lightning.networks.prompted.LearnedPrompts`.

    Raises:
        ConfigError: If the settings do not fit the towers.
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
        """Encodes both prompts in one pass of the text tower."""
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
