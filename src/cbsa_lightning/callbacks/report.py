"""What a finished run leaves behind: predictions and pictures."""

from __future__ import annotations

import lightning as L


class RunReport(L.Callback):
    """Writes predictions and pictures when training ends.

    Args:
        num_images: How many images the pictures show.
        enabled: False writes nothing.
    """

    def __init__(self, num_images: int = 16, enabled: bool = True) -> None:
        self.num_images = num_images
        self.enabled = enabled
