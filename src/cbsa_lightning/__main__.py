"""``python -m cbsa_lightning`` is the ``cbsa`` command."""

from cbsa_lightning.cli import entry_point

if __name__ == "__main__":
    entry_point()
