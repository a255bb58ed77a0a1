"""FrozenCLIP: an open_clip model as this library uses it."""

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

    All parameters come with ``requires_grad=False``, and the module stays in eval mode whatever ``train`` is
    called with, so no BatchNorm statistic ever moves. Only ``pool`` may be made trainable, by the network that
    uses it: everything below runs without gradients. Keys of ``state_dict``: ``tower.*`` (image tower below the
    pool, with its BatchNorm buffers), ``pool.*``, ``text.*`` (token embeddings and text transformer), and the
    buffers ``mean`` and ``std``.

    Args:
        loaded: what :func:`cbsa_lightning.clip.loading.load_open_clip` returned. Use :meth:`load`.

    Attributes:
        name: "model/pretrained" as asked for.
        weights: where the weights were read from, for people.
        fingerprint: SHA-256 (hex) over names, types, shapes and bytes of all weights, mean and std as loaded; training
            the pool later does not change it.
        logit_scale: CLIP's learned scale of cosines, exponentiated.
        embed_dim: d, size of the joint space.
        text_width: w, size of a token embedding.
        context_length: most tokens of a prompt.
        image_size: native side of an image, pixels. Others work: positions are resized.
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
        # Now, not when first asked for: a trained pool would change it.
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
            model: a name of open_clip, ``hf-hub:owner/name``, a folder (also ``local-dir:/path``) with
                open_clip_config.json and a weights file, a JSON file with an open_clip model config, or
                "embedded" for the small model inside this package.
            pretrained: a tag of open_clip, a weights file, or "random" for random weights. A folder or hub model
                brings its own weights: leave the default, or give a file to use instead.
            image_mean: three channel means for images in [0, 1], instead of the model's own. The model's own
                are those of its tag or open_clip_config.json (for a JSON or weights file: of one beside it with the
                same model config). Without one, a weights file for a name of open_clip gets what all tags of that
                name share; where they differ CLIP's, with a warning. A JSON config without one gets CLIP's.
            image_std: three channel deviations, likewise.

        Raises:
            WeightsError: the weights are not there, or do not fit; says which ways there are.
            ConfigError: ``pretrained`` is None, no such model, a tower without local features, a text tower that
                prompts cannot be learned through, or weights trained with QuickGELU for a model without it (refused
                for tags, OpenAI's archives and files beside an open_clip_config.json; any other file for a plain-GELU
                name that has a "-quickgelu" twin gets a warning, as nothing in it tells).
        """
        return cls(load_open_clip(model, pretrained, image_mean, image_std))

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever ``mode``."""
        return super().train(False)

    def speed_up(self) -> None:
        """Brings the image tower into the form that computes fastest; for good, and not twice.

        Batch norms are folded into the convolutions in front of them, and memory is laid out channels last. Features
        stay the same up to rounding, but not to the last bit. The fingerprint remains that of the weights as loaded.
        """
        fold_batch_norms(self.tower)
        self.tower.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Everything below the pool, without gradients.

        Args:
            images: (B, 3, H, W), uint8, or float in [0, 1]; normalized here.

        Returns:
            What ``pool`` takes: a map (B, c, h, w) of a ResNet or timm tower, tokens (B, 1 + h*w, c) of a ViT.

        Raises:
            DataError: another shape or type.
        """
        images = as_float(images, self.mean.dtype)
        with torch.no_grad():
            return cast(Tensor, self.tower((images - self.mean) / self.std))

    def image_tokens(self, images: Tensor) -> ImageTokens:
        """Global and local features (Eq. 3) of images (B, 3, H, W), uint8 or float in [0, 1]."""
        return cast(ImageTokens, self.pool(self.features(images)))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (P, context_length) of P texts.

        Raises:
            ConfigError: a text does not fit; CLIP's tokenizers would silently cut it.
        """
        # One place more than there is: a text that reaches it would have been cut.
        tokens = self.tokenizer(list(texts), context_length=self.context_length + 1)
        too_long = self.text.eot(tokens) >= self.context_length
        if too_long.any():
            offenders = [repr(text) for text, long in zip(texts, too_long.tolist(), strict=True) if long]
            raise ConfigError(f"longer than {self.context_length} tokens: {listed(offenders)}")
        return tokens[:, : self.context_length]

    def eot(self, tokens: Tensor) -> Tensor:
        """Positions (P,) of the end-of-text token, for :meth:`encode_prompts`."""
        return self.text.eot(tokens)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Frozen embeddings (P, L, w) of token ids (P, L), without positions."""
        return cast(Tensor, self.text.token_embedding(tokens.to(self.mean.device)))

    def encode_prompts(self, embeddings: Tensor, eot: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Text features (P, d) of prompt embeddings (P, L, w) read out at ``eot`` (P,); not normalized.

        The tower is causal: any L that includes the last end-of-text token gives the same features, so cut behind
        it. All prompts of a step go in one call. Differentiable. Words that many prompts begin with go in ``prefix``
        (G, N, w), to be encoded once; see :meth:`TextTower.forward`.
        """
        return cast(Tensor, self.text(embeddings, eot, prefix))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Text features (P, d) of P texts, without gradients, for zero-shot scores; not normalized."""
        tokens = self.tokenize(texts).to(self.mean.device)
        eot = self.eot(tokens)
        with torch.no_grad():
            return self.encode_prompts(self.embed_tokens(tokens[:, : int(eot.max()) + 1]), eot)


def as_float(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images ``(B, 3, H, W)`` as floats in [0, 1]: of uint8 ones, in ``dtype``; floats as they are.

    Raises:
        DataError: another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255
    if not images.is_floating_point():
        raise DataError(f"images must be uint8, or float in [0, 1], got {images.dtype}")
    return images


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) over the sorted names, types, shapes and bytes of a module's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
