"""Zero-shot CLIP, which scores images with the cosine between image and class name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.prompted import PromptedCLIP, cosines


class ZeroShotCLIP(PromptedCLIP):
    """Zero-shot CLIP as a network without trainable parameters. Probes on frozen features are also based on it.

    Args:
        prompt_names: The C class names to use in prompts.
        clip: open_clip model name, folder or configuration file, or "embedded" for the small model in this package.
        pretrained: Weights tag of open_clip, a weights file, or "random". Omit it for folders, which contain weights.

    Raises:
        ConfigError: If the settings are not compatible with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    def __init__(
        self, prompt_names: Sequence[str], clip: str = "RN50-quickgelu", pretrained: str | None = "openai"
    ) -> None:
        super().__init__(FrozenCLIP.load(clip, pretrained), prompt_names)

    def encode_text(self) -> Tensor:
        """Returns text features ``(C, d)`` of "a photo of a ..."."""
        return self.zero_shot_text()

    def forward(self, features: Tensor, text: Tensor | None = None, *, attention: bool = False) -> NetworkOutput:
        """Computes scaled cosines as logits; see :class:`Network`. There are no attention maps."""
        text = text if text is not None else self.encode_text()
        return NetworkOutput(self.clip.logit_scale * cosines(self.clip.pool(features).g, text))
