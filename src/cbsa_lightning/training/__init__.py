"""The training loop, modules, schedules, and comparisons of trained models."""
