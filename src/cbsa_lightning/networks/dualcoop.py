"""DualCoOp: a positive and a negative prompt a class, and evidence gathered over regions (Sun et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.prompted import PromptedCLIP, cosines, region_maps
from cbsa_lightning.networks.prompts import encode_prompt_sets


class DualText(NamedTuple):
    """Text features of the prompts that say a class is there, and that it is not, each ``(C, d)``."""

    positive: Tensor
    negative: Tensor


class DualCoOp(PromptedCLIP):
    """Regions vote for and against a class, those that look most like it loudest.

    Each class attends to regions by their similarity with its *positive* prompt; positive and negative similarities
    are summed with those weights. The original takes a softmax over both sums; its probability of the class is the
    sigmoid of their difference, which is the logit here.

    Source: repository sunxm2357/DualCoOp. Regions are the value path of the attention pool with
    positions, the mean token among them, as there. Other than there, and like every row of the paper's tables: CAP's
    pseudo-labels, ASL(0, 4), AdamW and one-cycle schedule in the place of partial labels, ASL(1, 2) and SGD.

    Args:
        prompt_names: The C class names, as they are to be read.
        clip: open_clip model, folder or configuration file; "embedded" is the small one inside this package.
        pretrained: open_clip weights tag or a file, or "random". Folders bring their own: leave it out.
        prompt_length: N, learnable words a prompt.
        shared_prompts: One set of words for all classes.
        region_scale: Factor of the cosines in the softmax over regions.
        scale: Factor of the cosines in the logit.

    Raises:
        ConfigError: If settings do not fit the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self,
        prompt_names: Sequence[str],
        clip: str = "RN50-quickgelu",
        pretrained: str | None = "openai",
        prompt_length: int = 16,
        shared_prompts: bool = False,
        region_scale: float = 20.0,
        scale: float = 100.0,
    ) -> None:
        super().__init__(FrozenCLIP.load(clip, pretrained), prompt_names)
        self.positive_prompts = self._prompts(prompt_length, shared_prompts)
        self.negative_prompts = self._prompts(prompt_length, shared_prompts)
        self.region_scale, self.scale = region_scale, scale

    def encode_text(self) -> DualText:
        """Text features of both prompts, in one pass of the text tower."""
        return DualText(*encode_prompt_sets(self.clip, [self.positive_prompts, self.negative_prompts]))

    def forward(self, features: Tensor, text: DualText | None = None, *, attention: bool = False) -> NetworkOutput:
        """See :class:`Network`; the attention is over the places of the grid, the mean token's share left out."""
        text = text if text is not None else self.encode_text()
        tokens = self.clip.pool.values(features)
        regions = torch.cat([tokens.g[:, None], tokens.l], dim=1)
        positive, negative = cosines(regions, text.positive), cosines(regions, text.negative)  # (B, 1 + hw, C)
        weights = (self.region_scale * positive).softmax(1)
        logits = self.scale * (weights * (positive - negative)).sum(1)
        return NetworkOutput(logits, None, region_maps(weights[:, 1:], tokens.grid) if attention else None)
