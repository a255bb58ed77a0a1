"""Atomic writing and checked reading of files, and the folder of a run."""
