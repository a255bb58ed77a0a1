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
"""Type of a function that creates a label decoder from the width d of queries and tokens."""


class TextFeatures(NamedTuple):
    """Text features of the classes, each ``(C, d)``.

    Attributes:
        target: t^t, used for classification.
        semantic: t^s, used as the queries of the decoder, or None.
    """

    target: Tensor
    semantic: Tensor | None


class CBSANetwork(PromptedCLIP):
    """CLIP with learnable prompts, a label decoder and a context head.

    Each component of the paper's Table 3 can be switched off. With ``target_prompts=False``, the classes are described
    by fixed template words (no TP). With ``semantic_alignment=False``, every class is compared with the global image
    feature (no SAA). With ``num_contexts=0``, there is no context head (no CI).

    Args:
        prompt_names: The C class names to use in prompts.
        clip: open_clip model name, folder or configuration file, or "embedded" for the small model in this package.
        pretrained: Weights tag of open_clip, a weights file, or "random". Omit it for folders, which contain weights.
        semantic_alignment: SAA in Table 3. If False, every class is compared with the global image feature.
        target_prompts: TP in Table 3. If False, the classes are described by the fixed words "a photo of a ...".
        num_contexts: K, the width of the context head. 0 disables context identification (CI in Table 3). The paper
            uses 6 on COCO, and 2 on VOC and NUS-WIDE.
        prompt_length: N, the number of learnable words per prompt.
        shared_prompts: Whether all classes share one set of learnable words (Table 8, "w/o CSP").
        prompt_template: Initial words of the prompts (Table 6, "Template"). If None, they are initialized with noise.
        decoder: Function that creates the label decoder (Eq. 4) from the width d. The decoder must have the arguments
            and return values of :class:`~cbsa_lightning.networks.decoder.LabelDecoder`. If None, it is a
            ``LabelDecoder`` with the ``decoder_*`` settings.
        decoder_layers: Number of blocks of the label decoder.
        decoder_heads: Number of attention heads of each block.
        decoder_feedforward: Hidden width of each block.
        decoder_dropout: Dropout rate of each block.
        decoder_self_attention: Whether the queries of the classes attend to each other.
        scale: Initial factor of the cosine in Eq. 5. Without it, probabilities would be limited to [0.27, 0.73].
        learn_scale: Whether this factor is learned.
        train_pool: Whether CLIP's attention pool is trained. If all layers before the global feature are frozen, the
            context loss does not reach any weights that the label task uses, so contexts cannot affect the labels.
        pool_lr_scale: Factor of the learning rate for the attention pool.

    Raises:
        ConfigError: If the settings contradict each other or are not compatible with the towers.
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
                f"{len(prompt_names)}, or 0 for no contexts."
            )
        if decoder is not None and not callable(decoder):
            raise ConfigError(
                f"decoder cannot be {decoder!r:.100}; give a class or function that creates a decoder from its width."
            )
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
                "Contexts are enabled, but the attention pool is frozen. The context loss then does not reach any "
                "weights that the label task uses, so it cannot affect the labels. Train the pool or disable contexts.",
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
        # This layer is created last, so that it does not affect the initial values of other weights.
        self.context_head = nn.Linear(towers.embed_dim, num_contexts) if num_contexts else None

    def encode_text(self) -> TextFeatures:
        """Encodes all prompts in one pass through the text tower."""
        if self.semantic_prompts is None:
            return TextFeatures(encode_prompt_sets(self.clip, [self.target_prompts])[0], None)
        target, semantic = encode_prompt_sets(self.clip, [self.target_prompts, self.semantic_prompts])
        return TextFeatures(target, semantic)

    def forward(self, features: Tensor, text: TextFeatures | None = None, *, attention: bool = False) -> NetworkOutput:
        """Computes the label and context logits (Eq. 3-5).

        Args:
            features: Output of :meth:`features`, ``(B, ...)``.
            text: Output of :meth:`encode_text`. If None, it is computed.
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
        """Returns the logits of Eq. 5 with the mean of ``label_features`` as the image feature of every label."""
        text = text if text is not None else self.encode_text()
        return self._cosine(label_features.mean(1, keepdim=True), text.target)

    def _cosine(self, aligned: Tensor, target: Tensor) -> Tensor:
        """Returns the scaled cosine of ``(B, C or 1, d)`` and ``(C, d)`` (Eq. 5), in float32 even under autocast."""
        with torch.autocast(aligned.device.type, enabled=False):
            z = nn.functional.normalize(aligned.float(), dim=-1)
            t = nn.functional.normalize(target.float(), dim=-1)
            return self.log_scale.float().exp() * (z * t).sum(-1)


SETTINGS: dict[str, Any] = {
    setting.name: setting.default
    for setting in inspect.signature(CBSANetwork).parameters.values()
    if setting.default is not setting.empty
}
"""Default settings of the network. Checkpoints store the settings in this form."""
