"""Annotations, splits, images, views, samplers, and the data module."""
