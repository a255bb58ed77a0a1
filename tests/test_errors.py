"""Error messages."""

from __future__ import annotations

import pytest

from cbsa_lightning.errors import CheckpointError, ConfigError, DataError, OutputError


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_a_long_message_keeps_its_beginning_and_its_end(kind):
    text = str(kind(f"photos.csv: row 3 is {'x' * 50_000}; correct it."))
    assert text.startswith("photos.csv: row 3 is xxx")
    assert text.endswith("xxx; correct it.")
    assert len(text) < 5000


def test_other_messages_are_not_cut():
    assert str(ConfigError("x" * 5000)) == "x" * 5000
    assert str(OutputError(28, "No space left on device", "a.csv")).startswith("a.csv: cannot be written (No space")
