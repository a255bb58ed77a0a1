"""The class `FrozenCLIP`, a frozen open_clip model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from cbsa_lightning.clip.loading import OWN, Loaded, load_open_clip
from cbsa_lightning.clip.pooling import ImageTokens, Pool
from cbsa_lightning.clip.text import TextTower
from cbsa_lightning.clip.towers import fold_batch_norms, fold_quick_gelus, split_tower
from cbsa_lightning.errors import ConfigError, DataError, listed


class FrozenCLIP(nn.Module):
    """Frozen CLIP model that returns dense image tokens and encodes prompt embeddings.

    All parameters have ``requires_grad=False``. The module stays in eval mode even if ``train`` is called, so BatchNorm
    statistics never change. A network may make ``pool`` trainable, but nothing else; the layers below the pool run
    without gradients. The keys of ``state_dict`` are ``tower.*`` (image tower below the pool, with its BatchNorm
    buffers), ``pool.*``, ``text.*`` (token embeddings and text transformer), and the buffers ``mean`` and ``std``.

    Args:
        loaded: Result of :func:`cbsa_lightning.clip.loading.load_open_clip`. In most cases, call :meth:`load` instead.

    Attributes:
        name: The requested model and weights as "model/pretrained".
        weights: Description of the source of the weights.
        fingerprint: SHA-256 (hex) of the names, types, shapes and bytes of all loaded weights, ``mean`` and ``std``.
            Training the pool does not change it.
        logit_scale: CLIP's learned factor of the cosines (the exponential of the stored logarithm).
        embed_dim: d, size of the joint space.
        text_width: w, size of a token embedding.
        context_length: Maximum number of tokens of a prompt.
        image_size: Native side length of an image in pixels. For other sizes, the positions are resized.
        mean, std: Buffers (1, 3, 1, 1) with the channel statistics for images in [0, 1].
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
        # This must be computed before the pool is trained.
        self.fingerprint = fingerprint(self)

    @classmethod
    def load(
        cls,
        model: str = "RN50-quickgelu",
        pretrained: str | None = OWN,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> Self:
        """Builds a model and loads its weights. Random weights are used only if ``pretrained`` is "random".

        Args:
            model: A model name of open_clip, ``hf-hub:owner/name``, a folder with open_clip_config.json and a weights
                file (also as ``local-dir:/path``), a JSON file with an open_clip model config, or "embedded" for the
                small model that is included in this package.
            pretrained: A tag of open_clip, a weights file, or "random" for random weights. A folder or hub model
                contains its own weights. To use them, keep the default.
            image_mean: Three channel means for images in [0, 1]. They replace the means of the model, which come from
                its tag or its open_clip_config.json. For a JSON config or a weights file, an open_clip_config.json in
                the same folder is used if it has the same model config. If there is none, a weights file for a model
                name of open_clip uses the statistics that all tags of that name share. If the tags differ, it uses
                CLIP's statistics and a warning is shown. A JSON config without such a file uses CLIP's statistics.
            image_std: Three channel standard deviations, which are determined in the same way.

        Raises:
            WeightsError: If the weights are missing or do not match the model. The message explains how to get them.
            ConfigError: If ``pretrained`` is None, the model is unknown, the image tower has no local features, or
                prompts cannot be learned through the text tower. This error is also raised if the weights were trained
                with QuickGELU but the model does not use it. The mismatch can be detected for tags, OpenAI's archives,
                and files next to an open_clip_config.json. For other weights files, a warning is shown if the model
                does not use QuickGELU but has a variant with the suffix "-quickgelu".
        """
        return cls(load_open_clip(model, pretrained, image_mean, image_std))

    def train(self, mode: bool = True) -> Self:
        """Keeps the module in eval mode, regardless of ``mode``."""
        return super().train(False)

    def speed_up(self) -> None:
        """Permanently converts the towers to their fastest form.

        Batch norms are folded into the preceding convolutions, the factor of QuickGELU is folded into the layers around
        it, and the memory format of the image tower is changed to channels last. This changes the features only by
        rounding errors. The fingerprint does not change.
        """
        fold_batch_norms(self.tower)
        fold_quick_gelus(self)
        self.tower.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Computes the output of the layers below the pool, without gradients.

        Args:
            images: (B, 3, H, W), uint8, or float in [0, 1]. This method normalizes them.

        Returns:
            The input of ``pool``: a map (B, c, h, w) of a ResNet or timm tower, or tokens (B, 1 + h*w, c) of a ViT.

        Raises:
            DataError: If the shape or type is wrong.
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
            ConfigError: If a text is too long. CLIP's tokenizers would silently truncate it.
        """
        # One more token than allowed is requested. If a text has this many tokens, it is too long.
        tokens = self.tokenizer(list(texts), context_length=self.context_length + 1)
        too_long = self.text.eot(tokens) >= self.context_length
        if too_long.any():
            offenders = [repr(text) for text, long in zip(texts, too_long.tolist(), strict=True) if long]
            raise ConfigError(f"texts are longer than {self.context_length} tokens: {listed(offenders)}; shorten them")
        return tokens[:, : self.context_length]

    def eot(self, tokens: Tensor) -> Tensor:
        """Returns the position (P,) of the end-of-text token of each text, as required by :meth:`encode_prompts`."""
        return self.text.eot(tokens)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the frozen embeddings (P, L, w) of token ids (P, L). Positions are not added."""
        return cast(Tensor, self.text.token_embedding(tokens.to(self.mean.device)))

    def encode_prompts(self, embeddings: Tensor, eot: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Encodes prompt embeddings (P, L, w) to text features (P, d), which are not normalized.

        The features are read at the positions ``eot`` (P,) of the end-of-text tokens, and are differentiable. Because
        the tower is causal, tokens after the last end-of-text token do not affect them, so omit these tokens. Encode
        all prompts of a step in one call. If prompts start with the same words, pass these words as ``prefix``
        (G, N, w), so that they are encoded only once; see :meth:`TextTower.forward`.
        """
        return cast(Tensor, self.text(embeddings, eot, prefix))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns text features (P, d) of P texts, without gradients. They are not normalized."""
        tokens = self.tokenize(texts).to(self.mean.device)
        eot = self.eot(tokens)
        with torch.no_grad():
            return self.encode_prompts(self.embed_tokens(tokens[:, : int(eot.max()) + 1]), eot)


def as_float(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts images ``(B, 3, H, W)`` to floats in [0, 1]. Float images are returned unchanged.

    Args:
        images: uint8, or float in [0, 1].
        dtype: Type of the result for uint8 images.

    Raises:
        DataError: If the shape or type is wrong.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255
    if not images.is_floating_point():
        raise DataError(f"images must be uint8, or float in [0, 1], got {images.dtype}")
    return images


def fingerprint(module: nn.Module) -> str:
    """Computes the SHA-256 (hex) of the sorted names, types, shapes and bytes of a module's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
