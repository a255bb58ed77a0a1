"""FrozenCLIP: an open_clip model as used by this library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from cbsa_lightning.clip.loading import OWN, Loaded, load_open_clip
from cbsa_lightning.clip.pooling import ImageTokens, Pool
from cbsa_lightning.clip.text import TextTower
from cbsa_lightning.clip.towers import fold_batch_norms, split_tower
from cbsa_lightning.errors import ConfigError, DataError, listed


class FrozenCLIP(nn.Module):
    """Frozen CLIP towers with dense image tokens and a text tower on prompt embeddings.

    All parameters have ``requires_grad=False``, and the module stays in eval mode even if ``train`` is called, so
    BatchNorm statistics never change. A network may make only ``pool`` trainable; everything below it runs without
    gradients. Keys of ``state_dict``: ``tower.*`` (image tower below the pool, with its BatchNorm buffers), ``pool.*``,
    ``text.*`` (token embeddings and text transformer), and the buffers ``mean`` and ``std``.

    Args:
        loaded: Result of :func:`cbsa_lightning.clip.loading.load_open_clip`. Use :meth:`load` instead.

    Attributes:
        name: "model/pretrained" as requested.
        weights: Readable description of where the weights come from.
        fingerprint: SHA-256 (hex) over names, types, shapes and bytes of all weights, mean and std as loaded. Training
            the pool does not change it.
        logit_scale: CLIP's learned scale of cosines, exponentiated.
        embed_dim: d, size of the joint space.
        text_width: w, size of a token embedding.
        context_length: Maximum number of tokens of a prompt.
        image_size: Native side of an image in pixels. Other sizes work: positions are resized.
        mean, std: (1, 3, 1, 1) buffers, channel statistics for images scaled to [0, 1].
    """

    mean: Tensor
    std: Tensor
    pool: Pool

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        clip = loaded.clip
        visual = cast(nn.Module, clip.visual)
        self.name = loaded.name
        self.weights = loaded.weights
        self.tokenizer = loaded.tokenizer
        self.tower, self.pool = split_tower(visual)
        self.text = TextTower(clip)
        self.register_buffer("mean", torch.tensor(loaded.image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(loaded.image_std).view(1, 3, 1, 1))
        self.logit_scale = float(cast(Tensor, clip.logit_scale).detach().exp())
        size = cast("int | Sequence[int]", visual.image_size)
        self.image_size = size if isinstance(size, int) else size[0]
        self.text_width = self.text.width
        self.context_length = self.text.context_length
        self.embed_dim = self.text.embed_dim
        self.requires_grad_(False)
        self.train(False)
        # Computed here, since training the pool would change it later.
        self.fingerprint = fingerprint(self)

    @classmethod
    def load(
        cls,
        model: str = "RN50-quickgelu",
        pretrained: str | None = OWN,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> Self:
        """Builds a model and loads its weights; never falls back to random ones.

        Args:
            model: A model name of open_clip, ``hf-hub:owner/name``, a folder (also ``local-dir:/path``) with
                open_clip_config.json and a weights file, a JSON file with an open_clip model config, or
                "embedded" for the small model inside this package.
            pretrained: A tag of open_clip, a weights file, or "random" for random weights. A folder or hub model
                contains its own weights: keep the default, or give a file to use instead.
            image_mean: Three channel means for images in [0, 1], which replace the model's own. The model's own
                come from its tag or open_clip_config.json (for a JSON or weights file: from one next to it with the
                same model config). Without one, a weights file for a name of open_clip uses the statistics that all
                tags of that name share; if they differ, it uses CLIP's with a warning. A JSON config without one uses
                CLIP's.
            image_std: Three channel standard deviations, likewise.

        Raises:
            WeightsError: If the weights do not exist or do not fit. The message lists the ways to get them.
            ConfigError: If ``pretrained`` is None, the model is unknown, the image tower has no local features, prompts
                cannot be learned through the text tower, or the weights were trained with QuickGELU but the model does
                not use it. The last is detected for tags, OpenAI's archives and files next to an
                open_clip_config.json. Any other file for a plain-GELU name that has a "-quickgelu" twin causes a
                warning.
        """
        return cls(load_open_clip(model, pretrained, image_mean, image_std))

    def train(self, mode: bool = True) -> Self:
        """Keeps the module in eval mode, whatever ``mode``."""
        return super().train(False)

    def speed_up(self) -> None:
        """Converts the image tower permanently to its fastest form. Call it at most once.

        Batch norms are folded into the preceding convolutions, and the memory format becomes channels last. Features
        change only by rounding. The fingerprint remains that of the weights as loaded.
        """
        fold_batch_norms(self.tower)
        self.tower.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Computes everything below the pool, without gradients.

        Args:
            images: (B, 3, H, W), uint8, or float in [0, 1]; normalized here.

        Returns:
            Input of ``pool``: a map (B, c, h, w) of a ResNet or timm tower, or tokens (B, 1 + h*w, c) of a ViT.

        Raises:
            DataError: If shape or type is wrong.
        """
        images = as_float(images, self.mean.dtype)
        with torch.no_grad():
            return cast(Tensor, self.tower((images - self.mean) / self.std))

    def image_tokens(self, images: Tensor) -> ImageTokens:
        """Computes global and local features (Eq. 3) of images (B, 3, H, W), uint8 or float in [0, 1]."""
        return cast(ImageTokens, self.pool(self.features(images)))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Returns the token ids (P, context_length) of P texts.

        Raises:
            ConfigError: If a text is too long; CLIP's tokenizers would silently truncate it.
        """
        # One token more than allowed: a text that reaches it would have been truncated.
        tokens = self.tokenizer(list(texts), context_length=self.context_length + 1)
        too_long = self.text.eot(tokens) >= self.context_length
        if too_long.any():
            offenders = [repr(text) for text, long in zip(texts, too_long.tolist(), strict=True) if long]
            raise ConfigError(f"longer than {self.context_length} tokens: {listed(offenders)}")
        return tokens[:, : self.context_length]

    def eot(self, tokens: Tensor) -> Tensor:
        """Returns the positions (P,) of the end-of-text token, for :meth:`encode_prompts`."""
        return self.text.eot(tokens)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the frozen embeddings (P, L, w) of token ids (P, L), without positions."""
        return cast(Tensor, self.text.token_embedding(tokens.to(self.mean.device)))

    def encode_prompts(self, embeddings: Tensor, eot: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Encodes prompt embeddings (P, L, w), read out at ``eot`` (P,), to text features (P, d); not normalized.

        Differentiable. The tower is causal: every L that includes the last end-of-text token yields the same features,
        so cut the embeddings after it. Encode all prompts of a step in one call. Put words that many prompts begin with
        in ``prefix`` (G, N, w), so that they are encoded once; see :meth:`TextTower.forward`.
        """
        return cast(Tensor, self.text(embeddings, eot, prefix))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns text features (P, d) of P texts for zero-shot scores, without gradients; not normalized."""
        tokens = self.tokenize(texts).to(self.mean.device)
        eot = self.eot(tokens)
        with torch.no_grad():
            return self.encode_prompts(self.embed_tokens(tokens[:, : int(eot.max()) + 1]), eot)


def as_float(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts images ``(B, 3, H, W)`` to floats in [0, 1]: uint8 to ``dtype``, floats unchanged.

    Raises:
        DataError: If shape or type is wrong.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255
    if not images.is_floating_point():
        raise DataError(f"images must be uint8, or float in [0, 1], got {images.dtype}")
    return images


def fingerprint(module: nn.Module) -> str:
    """Computes the SHA-256 (hex) over the sorted names, types, shapes and bytes of a module's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
