"""Content, writing and reading of checkpoints."""
