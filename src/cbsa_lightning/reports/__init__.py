"""Plots and the report page of a run."""
