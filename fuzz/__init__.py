"""Bad input of every kind, in great numbers: each gives a valid result or one of our errors that says where.

    uv run python -m fuzz --inputs 100000 --seed 1

One file a kind of input; ``harness.py`` runs them and judges what comes of it. Not part of the package.
"""
