"""Checks of a data set: a summary of its content and its faults."""
