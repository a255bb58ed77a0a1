"""DualCoOp: a positive and a negative prompt per class, applied to image regions (Sun et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.prompted import LearnedPrompts, cosines, region_maps
from cbsa_lightning.networks.prompts import encode_prompt_sets


class DualText(NamedTuple):
    """Text features of the prompts for the presence and the absence of a class, each ``(C, d)``."""

    positive: Tensor
    negative: Tensor


class DualCoOp(LearnedPrompts):
    """DualCoOp, which aggregates the evidence of image regions for and against each class.

    Each class attends to regions according to their similarity to its *positive* prompt. The similarities to the
    positive and to the negative prompt are summed with these attention weights. The original applies a softmax to both
    sums. The resulting probability of the class is the sigmoid of their difference, which is the logit here.

    Source: repository sunxm2357/DualCoOp. As in the source, regions are the value path of the attention pool with
    positions, including the mean token. Differences that all rows of the paper's tables have in common: CAP's
    pseudo-labels instead of partial labels, ASL(0, 4) instead of ASL(1, 2), and AdamW with a one-cycle schedule instead
    of SGD.

    Args:
        prompt_names: The C class names to use in prompts.
        region_scale: Factor of the cosines in the softmax over regions.
        scale: Factor of the cosines in the logit.
        **clip_and_prompts: ``clip``, ``pretrained``, ``prompt_length`` and ``shared_prompts``; see
            :class:`~cbsa_lightning.networks.prompted.LearnedPrompts`.

    Raises:
        ConfigError: If the settings are not compatible with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self,
        prompt_names: Sequence[str],
        region_scale: float = 20.0,
        scale: float = 100.0,
        **clip_and_prompts: Any,
    ) -> None:
        super().__init__(prompt_names, **clip_and_prompts)
        self.positive_prompts = self.new_prompts()
        self.negative_prompts = self.new_prompts()
        self.region_scale, self.scale = region_scale, scale

    def encode_text(self) -> DualText:
        """Encodes both prompts in one pass through the text tower."""
        return DualText(*encode_prompt_sets(self.clip, [self.positive_prompts, self.negative_prompts]))

    def forward(self, features: Tensor, text: DualText | None = None, *, attention: bool = False) -> NetworkOutput:
        """Computes the logits; see :class:`Network`. The attention maps do not include the mean token."""
        text = text if text is not None else self.encode_text()
        tokens = self.clip.pool.values(features)
        regions = torch.cat([tokens.g[:, None], tokens.l], dim=1)
        positive, negative = cosines(regions, text.positive), cosines(regions, text.negative)  # (B, 1 + hw, C)
        weights = (self.region_scale * positive).softmax(1)
        logits = self.scale * (weights * (positive - negative)).sum(1)
        return NetworkOutput(logits, None, region_maps(weights[:, 1:], tokens.grid) if attention else None)
