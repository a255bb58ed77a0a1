"""The paper's network: semantic-aware alignment (section 3.1) and the context head (section 3.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.decoder import LabelDecoder
from cbsa_lightning.networks.prompted import PromptedCLIP
from cbsa_lightning.networks.prompts import encode_prompt_sets

if TYPE_CHECKING:
    from cbsa_lightning.clip import FrozenCLIP


class TextFeatures(NamedTuple):
    """Features of the classes: ``target`` t^t ``(C, d)`` classifies, ``semantic`` t^s ``(C, d)`` or None queries."""

    target: Tensor
    semantic: Tensor | None


class CBSANetwork(PromptedCLIP):
    """CLIP with prompts, label decoder and context head.

    Each part of the paper's Table 3 can be left out: ``target_prompts=False`` classifies with fixed template words
    (TP off), ``decoder=None`` compares the global image feature with every class (SAA off), ``num_contexts=0`` has
    no context head (CI off).

    Args:
        clip: The frozen towers.
        prompt_names: The C class names, as they are to be read.
        decoder: Makes label-specific features (Eq. 4), or None.
        num_contexts: K, width of the context head; 0 for none.
        prompt_length: N, learnable words a prompt.
        shared_prompts: One set of words for all classes (Table 8, "w/o CSP").
        prompt_template: Words that prompts start from (Table 6, "Template"); None starts from noise.
        target_prompts: Whether the target prompts are learned.
        scale: Initial factor of the cosine in Eq. 5; a bare cosine would hold probabilities in [0.27, 0.73].
        learn_scale: Whether that factor is learned.
        train_pool: Whether CLIP's attention pool is trained. With everything before the global feature frozen,
            the context loss reaches no weight that the label task shares, so contexts could change nothing.
        pool_lr_scale: Factor of the learning rate for the attention pool.
    """

    context_tensors = ("context_head.weight", "context_head.bias")

    def __init__(
        self,
        clip: FrozenCLIP,
        prompt_names: Sequence[str],
        decoder: LabelDecoder | None = None,
        num_contexts: int = 0,
        prompt_length: int = 16,
        shared_prompts: bool = False,
        prompt_template: str | None = None,
        target_prompts: bool = True,
        scale: float = 20.0,
        learn_scale: bool = True,
        train_pool: bool = True,
        pool_lr_scale: float = 0.3,
    ) -> None:
        super().__init__(clip, prompt_names, train_pool, pool_lr_scale)
        self.num_contexts = num_contexts
        if num_contexts and not train_pool:
            warnings.warn(
                "Contexts are on but the attention pool is frozen: the context loss then reaches no weight that the "
                "label task shares and cannot change any label. Train the pool, or switch contexts off.",
                stacklevel=2,
            )
        words = (prompt_length, shared_prompts, prompt_template)
        if target_prompts:
            self.target_prompts = self._prompts(*words)
        else:
            self.target_prompts = self._prompts(
                prompt_length, False, prompt_template or "a photo of a", trainable=False
            )
        self.decoder = decoder
        self.has_label_features = decoder is not None
        self.semantic_prompts = self._prompts(*words) if decoder is not None else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        # Made last, so that switching contexts on or off leaves the start of all other weights as it is.
        self.context_head = nn.Linear(clip.embed_dim, num_contexts) if num_contexts else None

    def encode_text(self) -> TextFeatures:
        """Text features of all prompts, in one pass of the text tower."""
        if self.semantic_prompts is None:
            return TextFeatures(encode_prompt_sets(self.clip, [self.target_prompts])[0], None)
        target, semantic = encode_prompt_sets(self.clip, [self.target_prompts, self.semantic_prompts])
        return TextFeatures(target, semantic)

    def forward(self, features: Tensor, text: TextFeatures | None = None, *, attention: bool = False) -> NetworkOutput:
        """Aligns each image with each class (Eq. 3-5) and names its context.

        Args:
            features: What :meth:`features` gave, ``(B, ...)``.
            text: What :meth:`encode_text` gave; computed here when None.
            attention: Whether to give the decoder's attention maps.
        """
        text = text if text is not None else self.encode_text()
        maps = None
        if self.decoder is None or text.semantic is None:
            tokens = self.clip.pool(features)
            aligned = tokens.g[:, None]
        else:
            tokens, places = self.clip.pool.both(features)
            aligned, maps = self.decoder(text.semantic.to(tokens.l.dtype), tokens.l, places.l, attention)
        logits = self._cosine(aligned, text.target)
        context_logits = None if self.context_head is None else self.context_head(tokens.g)
        if maps is not None:
            maps = maps.unflatten(-1, tokens.grid)
        return NetworkOutput(logits, context_logits, maps, None if self.decoder is None else aligned)

    def mean_feature_logits(self, label_features: Tensor, text: TextFeatures | None = None) -> Tensor:
        """Logits when every label gets the same image feature: what Eq. 5 gives without label-specific features."""
        text = text if text is not None else self.encode_text()
        return self._cosine(label_features.mean(1, keepdim=True), text.target)

    def _cosine(self, aligned: Tensor, target: Tensor) -> Tensor:
        """Scaled cosine of ``(B, C or 1, d)`` with ``(C, d)`` (Eq. 5), in float32 whatever the autocast."""
        with torch.autocast(aligned.device.type, enabled=False):
            z = nn.functional.normalize(aligned.float(), dim=-1)
            t = nn.functional.normalize(target.float(), dim=-1)
            return self.log_scale.float().exp() * (z * t).sum(-1)


def build_cbsa_network(
    prompt_names: Sequence[str],
    *,
    clip: str,
    pretrained: str | None,
    semantic_alignment: bool,
    target_prompts: bool,
    num_contexts: int,
    prompt_length: int,
    shared_prompts: bool,
    prompt_template: str | None,
    decoder_layers: int,
    decoder_heads: int,
    decoder_feedforward: int,
    decoder_dropout: float,
    decoder_self_attention: bool,
    scale: float,
    learn_scale: bool,
    train_pool: bool,
    pool_lr_scale: float,
) -> CBSANetwork:
    """Builds the network from plain settings: those that a checkpoint holds, so that no module is needed to use it.

    ``semantic_alignment`` says whether there is a :class:`LabelDecoder`, ``clip`` and ``pretrained`` go to
    :meth:`FrozenCLIP.load`; for all others see :class:`CBSANetwork` and :class:`LabelDecoder`. The defaults are
    those of :class:`cbsa_lightning.training.cbsa.CBSAModule`, and are kept there alone.

    Raises:
        ConfigError: If settings do not fit each other or the towers.
        WeightsError: If the CLIP weights cannot be had.
    """
    from cbsa_lightning.clip import FrozenCLIP  # open_clip takes seconds to import

    towers = FrozenCLIP.load(clip, pretrained)
    sizes = (decoder_layers, decoder_heads, decoder_feedforward, decoder_dropout, decoder_self_attention)
    return CBSANetwork(
        towers,
        prompt_names,
        decoder=LabelDecoder(towers.embed_dim, *sizes) if semantic_alignment else None,
        num_contexts=num_contexts,
        prompt_length=prompt_length,
        shared_prompts=shared_prompts,
        prompt_template=prompt_template,
        target_prompts=target_prompts,
        scale=scale,
        learn_scale=learn_scale,
        train_pool=train_pool,
        pool_lr_scale=pool_lr_scale,
    )
