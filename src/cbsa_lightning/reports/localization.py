"""Plot of where the images show their labels, according to several maps (Fig. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cbsa_lightning.errors import DataError
from cbsa_lightning.reports.pictures import DARK, GREY, show_image

_LONGEST = 18  # characters of a title


def localization_gallery(
    images: Sequence[NDArray[np.uint8]],
    titles: Sequence[str],
    maps: Mapping[str, NDArray[np.float32]],
    columns: int = 8,
) -> Figure:
    """Draws each image with a map of each kind below it.

    Args:
        images: The n images ``(S, S, 3)``; an image with several labels occurs once for each label.
        titles: The label of each image.
        maps: For each kind of map, ``(n, h, w)``, at least 0; values from the map's mean to its peak are shown.
        columns: Images per row.

    Raises:
        DataError: If there are no images.
    """
    if not len(images):
        raise DataError("There are no images to show.")
    columns = min(columns, len(images))
    blocks = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    side, gap, head, title, names = 1.5, 0.1, 0.85, 0.3, 1.25
    rows = 1 + len(maps)
    width = max(names + columns * (side + gap) + 0.2, 6.4)
    tall = title + rows * (side + gap) + 0.15
    height = head + tall * len(blocks)
    figure = Figure(figsize=(width, height))
    figure.text(0.3 / width, 1 - 0.35 / height, "Location of each label", size=14, weight="bold", color=DARK)
    note = "bright: high values, relative to the mean of the map; no color anywhere: the map is zero"
    figure.text(0.3 / width, 1 - 0.6 / height, note, color=GREY, size=9)
    for number, block in enumerate(blocks):
        top = height - head - number * tall - title
        for row, kind in enumerate(["image", *maps]):
            bottom = top - (row + 1) * side - row * gap
            middle = (bottom + side / 2) / height
            figure.text((names - 0.1) / width, middle, kind.replace(" ", "\n"), size=9, ha="right", va="center")
            for column, i in enumerate(block):
                x = names + column * (side + gap)
                axes = figure.add_axes((x / width, bottom / height, side / width, side / height))
                show_image(axes, images[i], None if row == 0 else maps[kind][i])
                if row == 0:
                    name = titles[i] if len(titles[i]) <= _LONGEST else f"{titles[i][: _LONGEST - 1]}…"
                    axes.set_title(name, size=9, pad=4, color=DARK, parse_math=False)
    return figure
