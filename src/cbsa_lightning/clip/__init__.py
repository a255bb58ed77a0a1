"""CLIP as this library uses it: frozen towers, dense image tokens, a text tower on prompt embeddings."""

from cbsa_lightning.clip.frozen import FrozenCLIP
from cbsa_lightning.clip.pooling import ImageTokens

__all__ = ["FrozenCLIP", "ImageTokens"]
