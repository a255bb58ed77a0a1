"""Callbacks that run before training, once per epoch, or at the end of a run."""
