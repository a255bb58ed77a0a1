"""The training loop, ready modules, schedules, and comparisons of trained models."""
