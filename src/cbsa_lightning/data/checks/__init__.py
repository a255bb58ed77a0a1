"""Checks of a data set, which summarize its content and report problems."""
