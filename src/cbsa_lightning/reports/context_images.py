"""Plot of the images with the highest probability of each context (Fig. 4)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cbsa_lightning.errors import DataError
from cbsa_lightning.reports.pictures import CONTEXT_COLOURS, DARK, GREY, show_image

_LINES = 3  # lines of class names above a row of images


def context_images(
    images: Sequence[Sequence[NDArray[np.uint8]]],
    probabilities: Sequence[Sequence[float]],
    class_names: Sequence[Sequence[str]],
) -> Figure:
    """Draws one row of images per context, with the classes of the context above the row.

    Args:
        images: For each of the K contexts, its images ``(S, S, 3)`` in descending order of their probability.
        probabilities: For each context, the probabilities of its images.
        class_names: For each context, the names of its classes.

    Raises:
        DataError: If there are no images.
    """
    if not any(len(row) for row in images):
        raise DataError("There are no images to show.")
    columns = max(len(row) for row in images)
    side, gap, line, head = 1.7, 0.12, 0.17, 0.85
    width = max(0.6 + columns * (side + gap) - gap, 5.6)
    titles = [_wrapped(names, int((width - 0.6) * 12)) for names in class_names]
    heights = [0.3 + line * len(title) + side + 0.42 for title in titles]
    height = head + sum(heights)
    figure = Figure(figsize=(width, height))
    figure.text(0.3 / width, 1 - 0.35 / height, "Images with the highest context probability", size=14, weight="bold")
    figure.text(0.3 / width, 1 - 0.6 / height, "The number below an image is its probability", color=GREY, size=9)
    top = height - head
    for k, (row, values, title, tall) in enumerate(zip(images, probabilities, titles, heights, strict=True)):
        color = CONTEXT_COLOURS[k % len(CONTEXT_COLOURS)]
        figure.text(0.3 / width, top / height, f"Context {k + 1}", color=color, size=10, weight="bold", va="top")
        for number, text in enumerate(title):
            y = (top - 0.22 - line * number) / height
            figure.text(0.3 / width, y, text, color=DARK, size=9, va="top", parse_math=False)
        bottom = top - 0.3 - line * len(title) - side
        for column, (image, value) in enumerate(zip(row, values, strict=True)):
            x = 0.3 + column * (side + gap)
            axes = figure.add_axes((x / width, bottom / height, side / width, side / height))
            show_image(axes, image)
            center = (x + side / 2) / width
            figure.text(center, (bottom - 0.05) / height, f"{value:.2f}", size=9, ha="center", va="top", color=DARK)
        top -= tall
    return figure


def _wrapped(names: Sequence[str], characters: int) -> list[str]:
    """Returns the names in at most :data:`_LINES` lines; further names are only counted."""
    shown = len(names)
    while True:
        rest = f" … and {len(names) - shown} more" if shown < len(names) else ""
        lines = textwrap.wrap(", ".join(names[:shown]) + rest, characters) or ["no class"]
        if len(lines) <= _LINES or shown <= 1:
            return lines[:_LINES]
        shown -= 1
