"""DualCoOp++: a third prompt that selects regions, and competition between classes (Hu et al., TPAMI 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.prompted import LearnedPrompts, cosines, region_maps
from cbsa_lightning.networks.prompts import encode_prompt_sets

SCALE = math.exp(3.0)  # factor of the cosines; a parameter in the original, but its optimizer never updates it
SHARPNESS = 200.0  # factor of the cosines in the competition between classes


class EvidentialText(NamedTuple):
    """Text features ``(C, d)`` of the prompts for regions of interest, for presence, and for absence of a class."""

    evidential: Tensor
    positive: Tensor
    negative: Tensor


class DualCoOpPlusPlus(LearnedPrompts):
    """DualCoOp++: evidence-guided regions, with a winner-take-all competition between the classes at each region.

    Each class attends to regions according to their similarity to its *evidential* prompt. At each region, the positive
    similarities are weighted by a softmax over the *classes*, which increases the score of the best class but not of
    similar classes. The logit is the difference between the positive and the negative sum. Its sigmoid equals the
    original's softmax over both sums.

    Source: repository kjmillerCURIS/dualcoopstarstar, a continuation of the authors' code, since there is no official
    release. As in the source, regions are the value path of the attention pool without positions and without the mean
    token. Differences, which all rows of the paper's tables have in common: 16 words per prompt instead of 21, CAP's
    pseudo-labels, ASL(0, 4), and AdamW with a one-cycle schedule.

    Args:
        prompt_names: The C class names to use in prompts.
        normalized_winners: Whether to multiply positive similarities by the weight divided by its maximum at the
            region, as the original does on COCO. Otherwise, they are multiplied by one plus the weight, as on VOC and
            NUS-WIDE.
        **clip_and_prompts: ``clip``, ``pretrained``, ``prompt_length`` and ``shared_prompts``; see
            :class:`~cbsa_lightning.networks.prompted.LearnedPrompts`.

    Raises:
        ConfigError: If the settings are not compatible with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self,
        prompt_names: Sequence[str],
        normalized_winners: bool = False,
        **clip_and_prompts: Any,
    ) -> None:
        super().__init__(prompt_names, **clip_and_prompts)
        self.evidential_prompts = self.new_prompts()
        self.positive_prompts = self.new_prompts()
        self.negative_prompts = self.new_prompts()
        self.log_temperature = nn.Parameter(torch.tensor(3.0))
        self.normalized_winners = normalized_winners

    def encode_text(self) -> EvidentialText:
        """Encodes the three prompts in one pass through the text tower."""
        sets = [self.evidential_prompts, self.positive_prompts, self.negative_prompts]
        return EvidentialText(*encode_prompt_sets(self.clip, sets))

    def forward(
        self, features: Tensor, text: EvidentialText | None = None, *, attention: bool = False
    ) -> NetworkOutput:
        """Computes the logits; see :class:`Network`."""
        text = text if text is not None else self.encode_text()
        tokens = self.clip.pool.values(features, positions=False)
        evidential, positive, negative = (cosines(tokens.l, t) for t in text)  # each (B, hw, C)
        weights = (self.log_temperature.exp() * evidential).softmax(1)
        logits = SCALE * (weights * (positive * self._winners(positive) - negative)).sum(1)
        return NetworkOutput(logits, None, region_maps(weights, tokens.grid) if attention else None)

    def _winners(self, positive: Tensor) -> Tensor:
        """Returns the factor of each class at each region, ``(B, hw, C)``."""
        share = (SHARPNESS * positive * positive.amax(-1, keepdim=True)).softmax(-1)
        return share / share.amax(-1, keepdim=True) if self.normalized_winners else 1 + share
