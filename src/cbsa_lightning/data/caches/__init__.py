"""Caches of decoded images and of frozen features on disk."""
