"""Labeling of images with a trained model, without Lightning."""
