"""CLIP as used by this library: frozen towers, dense image tokens, and a text tower on prompt embeddings."""

from cbsa_lightning.clip.frozen import FrozenCLIP
from cbsa_lightning.clip.pooling import ImageTokens

__all__ = ["FrozenCLIP", "ImageTokens"]
