"""Frozen CLIP towers that return dense image tokens and encode prompt embeddings."""

from cbsa_lightning.clip.frozen import FrozenCLIP
from cbsa_lightning.clip.pooling import ImageTokens

__all__ = ["FrozenCLIP", "ImageTokens"]
