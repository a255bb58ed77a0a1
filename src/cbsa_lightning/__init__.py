"""CBSA."""
