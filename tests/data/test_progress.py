"""Whether a process shows progress bars."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cbsa_lightning.data.progress import shows_progress


@pytest.mark.parametrize(
    ("first", "callback", "shows"), [(True, "bar", True), (False, "bar", False), (True, None, False)]
)
def test_the_first_process_of_a_trainer_with_bars_shows_progress(first, callback, shows):
    assert shows_progress(SimpleNamespace(is_global_zero=first, progress_bar_callback=callback)) == shows


def test_progress_is_shown_without_a_trainer():
    assert shows_progress(None)
