"""The paper's network: semantic-aware alignment (section 3.1) and the context head (section 3.2)."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_lightning.arguments import check_flags, check_number
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.decoder import LabelDecoder
from cbsa_lightning.networks.prompted import PromptedCLIP
from cbsa_lightning.networks.prompts import encode_prompt_sets

DecoderCallable = Callable[[int], nn.Module]
"""Creates a label decoder from the width d of queries and tokens."""


class TextFeatures(NamedTuple):
    """Class features: ``target`` t^t ``(C, d)`` for classification, ``semantic`` t^s ``(C, d)`` or None as queries."""

    target: Tensor
    semantic: Tensor | None


class CBSANetwork(PromptedCLIP):
    """CLIP with prompts, label decoder and context head.

    Each part of the paper's Table 3 can be switched off. ``target_prompts=False`` classifies with fixed template words
    (TP off). ``semantic_alignment=False`` compares the global image feature with every class (SAA off).
    ``num_contexts=0`` removes the context head (CI off).

    Args:
        prompt_names: The C class names as used in prompts.
        clip: open_clip model, folder or configuration file; "embedded" is the small one inside this package.
        pretrained: open_clip weights tag or a file, or "random". Omit it for folders, which contain their weights.
        semantic_alignment: SAA of Table 3. If False, the global image feature is compared with every class.
        target_prompts: TP of Table 3. If False, the classes are the fixed words "a photo of a ...".
        num_contexts: K, width of the context head; 0 switches context identification (CI of Table 3) off. The paper
            uses 6 on COCO, and 2 on VOC and NUS-WIDE.
        prompt_length: N, number of learnable words per prompt.
        shared_prompts: Whether all classes share one set of words (Table 8, "w/o CSP").
        prompt_template: Initial words of the prompts (Table 6, "Template"); None starts from noise.
        decoder: Creates the label decoder (Eq. 4) from the width d, with the arguments and return values of
            :class:`~cbsa_lightning.networks.decoder.LabelDecoder`. None: ``LabelDecoder`` with the ``decoder_*``
            settings.
        decoder_layers: Blocks of the label decoder.
        decoder_heads: Attention heads of each block.
        decoder_feedforward: Hidden width of each block.
        decoder_dropout: Dropout rate of each block.
        decoder_self_attention: Whether the classes' queries attend to each other.
        scale: Initial factor of the cosine in Eq. 5. A bare cosine would limit probabilities to [0.27, 0.73].
        learn_scale: Whether that factor is learned.
        train_pool: Whether CLIP's attention pool is trained. If everything before the global feature is frozen, the
            context loss reaches no weight that the label task shares, so contexts cannot change the labels.
        pool_lr_scale: Factor of the learning rate for the attention pool.

    Raises:
        ConfigError: If the settings do not fit each other or the towers.
        WeightsError: If the CLIP weights are not available.
    """

    context_tensors = ("context_head.weight", "context_head.bias")

    def __init__(
        self,
        prompt_names: Sequence[str],
        clip: str = "RN50-quickgelu",
        pretrained: str | None = "openai",
        semantic_alignment: bool = True,
        target_prompts: bool = True,
        num_contexts: int = 6,
        prompt_length: int = 16,
        shared_prompts: bool = False,
        prompt_template: str | None = None,
        decoder: DecoderCallable | None = None,
        decoder_layers: int = 2,
        decoder_heads: int = 8,
        decoder_feedforward: int = 2048,
        decoder_dropout: float = 0.1,
        decoder_self_attention: bool = True,
        scale: float = 20.0,
        learn_scale: bool = True,
        train_pool: bool = True,
        pool_lr_scale: float = 0.3,
    ) -> None:
        check_number("num_contexts", num_contexts, 0, whole=True)
        check_number("scale", scale, 0)
        check_number("pool_lr_scale", pool_lr_scale, 0)
        check_flags(
            semantic_alignment=semantic_alignment,
            target_prompts=target_prompts,
            learn_scale=learn_scale,
            train_pool=train_pool,
        )
        if num_contexts > len(prompt_names):
            raise ConfigError(
                f"{num_contexts} contexts cannot be formed from {len(prompt_names)} classes; choose num_contexts <= "
                f"{len(prompt_names)}, or 0 for none."
            )
        if decoder is not None and not callable(decoder):
            raise ConfigError(f"decoder cannot be {decoder!r:.100}; give a class or function of the width.")
        sizes: dict[str, Any] = {
            "layers": decoder_layers,
            "heads": decoder_heads,
            "feedforward": decoder_feedforward,
            "dropout": decoder_dropout,
            "self_attention": decoder_self_attention,
        }
        from cbsa_lightning.clip import FrozenCLIP  # open_clip takes seconds to import

        towers = FrozenCLIP.load(clip, pretrained)
        make_decoder: DecoderCallable = decoder if decoder is not None else partial(LabelDecoder, **sizes)
        aligner = make_decoder(towers.embed_dim) if semantic_alignment else None
        super().__init__(towers, prompt_names, train_pool, pool_lr_scale)
        self.num_contexts = num_contexts
        if num_contexts and not train_pool:
            warnings.warn(
                "Contexts are on but the attention pool is frozen. The context loss then reaches no weight that the "
                "label task shares, so it cannot change any label. Train the pool or switch contexts off.",
                stacklevel=2,
            )
        words = (prompt_length, shared_prompts, prompt_template)
        if target_prompts:
            self.target_prompts = self._prompts(*words)
        else:
            self.target_prompts = self._prompts(
                prompt_length, False, prompt_template or "a photo of a", trainable=False
            )
        self.decoder = aligner
        self.has_label_features = aligner is not None
        self.semantic_prompts = self._prompts(*words) if aligner is not None else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        # Created last, so that switching contexts on or off does not change the initial values of other weights.
        self.context_head = nn.Linear(towers.embed_dim, num_contexts) if num_contexts else None

    def encode_text(self) -> TextFeatures:
        """Encodes all prompts in one pass of the text tower."""
        if self.semantic_prompts is None:
            return TextFeatures(encode_prompt_sets(self.clip, [self.target_prompts])[0], None)
        target, semantic = encode_prompt_sets(self.clip, [self.target_prompts, self.semantic_prompts])
        return TextFeatures(target, semantic)

    def forward(self, features: Tensor, text: TextFeatures | None = None, *, attention: bool = False) -> NetworkOutput:
        """Computes the label and context logits (Eq. 3-5).

        Args:
            features: Output of :meth:`features`, ``(B, ...)``.
            text: Output of :meth:`encode_text`; None computes it here.
            attention: Whether to return the decoder's attention maps.
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
        """Returns the logits of Eq. 5 if every label uses the same image feature."""
        text = text if text is not None else self.encode_text()
        return self._cosine(label_features.mean(1, keepdim=True), text.target)

    def _cosine(self, aligned: Tensor, target: Tensor) -> Tensor:
        """Returns the scaled cosine of ``(B, C or 1, d)`` with ``(C, d)`` (Eq. 5), in float32 even under autocast."""
        with torch.autocast(aligned.device.type, enabled=False):
            z = nn.functional.normalize(aligned.float(), dim=-1)
            t = nn.functional.normalize(target.float(), dim=-1)
            return self.log_scale.float().exp() * (z * t).sum(-1)


SETTINGS: dict[str, Any] = {
    setting.name: setting.default
    for setting in inspect.signature(CBSANetwork).parameters.values()
    if setting.default is not setting.empty
}
"""Settings of a network with their defaults, as stored in a checkpoint."""
