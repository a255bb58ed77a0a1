"""SCPNet: class embeddings that are refined with a graph of class-name similarities (Ding et al., CVPR 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.graph_convolution import graph_convolution
from cbsa_lightning.networks.prompted import LearnedPrompts, cosines, parameter_groups
from cbsa_lightning.networks.prompts import encode_prompt_sets

OWN_SHARE = 0.8  # weight of a class in its own row of the graph; the rest is divided among its neighbors


class SCPNet(LearnedPrompts):
    """SCPNet, which compares the global image feature with class embeddings refined by graph convolutions.

    Source: repository jameslahm/SCPNet, which contains its relation matrix but not the code that generates it. Here,
    the matrix consists of the cosines of CLIP's text features of "a photo of a ...", which is consistent with the
    values in the repository. Other differences: The image encoder is frozen, as in all rows of the paper's tables.
    Prompts are initialized with class-specific noise instead of "a photo of a". CAP's pseudo-labels and ASL(0, 4)
    replace the losses for single positive labels and the consistency term, as in the paper's combination with CAP.

    Args:
        prompt_names: The C class names to use in prompts.
        neighbors: Number of entries to keep in each row of the graph, including the class itself. The original uses 62
            on COCO, 50 on NUS-WIDE, and all 20 on VOC. None keeps all entries.
        scale: Constant factor of the cosine. The original uses 10, and CLIP's factor (about 100) on NUS-WIDE.
        hidden: Width of the graph convolutions.
        graph_lr_scale: Factor of the learning rate for the graph convolutions. With the default and a learning rate of
            1e-3, they are trained with 1e-4, which is within the original's range of 1e-5 to 2e-4.
        **clip_and_prompts: ``clip``, ``pretrained``, ``prompt_length`` and ``shared_prompts``; see
            :class:`~cbsa_lightning.networks.prompted.LearnedPrompts`.

    Raises:
        ConfigError: If the settings are not compatible with the towers.
        WeightsError: If the CLIP weights are not available.
    """

    graph: Tensor

    def __init__(
        self,
        prompt_names: Sequence[str],
        neighbors: int | None = None,
        scale: float = 10.0,
        hidden: int = 2048,
        graph_lr_scale: float = 0.1,
        **clip_and_prompts: Any,
    ) -> None:
        super().__init__(prompt_names, **clip_and_prompts)
        self.prompts = self.new_prompts()
        self.scale, self.graph_lr_scale = scale, graph_lr_scale
        text = self.zero_shot_text()
        # Checkpoints exclude this buffer, because it depends only on the class names and the frozen towers.
        self.register_buffer("graph", relation_graph(cosines(text, text), neighbors), persistent=False)
        widths = (self.clip.embed_dim, hidden, hidden, self.clip.embed_dim)
        self.convolutions = nn.ModuleList(graph_convolution(*ends) for ends in itertools.pairwise(widths))

    def encode_text(self) -> Tensor:
        """Returns refined class embeddings ``(C, d)``."""
        (text,) = encode_prompt_sets(self.clip, [self.prompts])
        x = text
        for i, layer in enumerate(self.convolutions):
            x = self.graph.to(x.dtype) @ layer(F.leaky_relu(x, 0.2) if i else x)
        return text + x

    def forward(self, features: Tensor, text: Tensor | None = None, *, attention: bool = False) -> NetworkOutput:
        """Computes the logits; see :class:`Network`. There are no attention maps."""
        text = text if text is not None else self.encode_text()
        return NetworkOutput(self.scale * cosines(self.clip.pool(features).g, text))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns parameter groups. The graph convolutions have their own learning-rate factor."""
        return parameter_groups(self, self.convolutions, self.graph_lr_scale)


def relation_graph(relation: Tensor, neighbors: int | None = None) -> Tensor:
    """Returns the graph ``(C, C)`` of a relation matrix ``(C, C)``. Each row sums to 1.

    Args:
        relation: Similarities of the classes. Negative entries count as 0. Those of CLIP are far above 0.
        neighbors: Number of highest entries to keep in each row, including the class itself. None keeps all entries.

    Raises:
        ConfigError: If there are fewer than two classes, or ``neighbors`` is not between 2 and C.
    """
    number = len(relation)
    if number < 2:
        raise ConfigError("SCPNet requires at least two classes, since its graph connects each class to others.")
    kept = number if neighbors is None else neighbors
    if not 2 <= kept <= number:
        raise ConfigError(f"SCPNet: neighbors must be between 2 and the {number} classes, got {kept}.")
    relation = relation.clone().fill_diagonal_(torch.inf)  # a class is nearest to itself, even if names are equal
    highest = relation.topk(kept, dim=1)
    rows = torch.zeros_like(relation).scatter_(1, highest.indices, highest.values.clamp(min=0)).fill_diagonal_(0)
    rows = rows / rows.sum(1, keepdim=True).clamp(min=1e-12) * (1 - OWN_SHARE)
    return rows.fill_diagonal_(OWN_SHARE)
