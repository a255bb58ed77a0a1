"""Progress bars of computations that are not part of Lightning's loops."""

from __future__ import annotations

from typing import Any


def shows_progress(trainer: Any) -> bool:
    """Returns whether this process shows progress bars.

    Args:
        trainer: The Trainer. As in Lightning, only its first process shows bars, and only if bars are enabled. None
            stands for a computation without a Trainer, which shows bars.
    """
    return trainer is None or (trainer.is_global_zero and trainer.progress_bar_callback is not None)
