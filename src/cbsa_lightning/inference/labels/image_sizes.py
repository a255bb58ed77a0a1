"""Reads the sizes of images, as defined by CVAT, from the file headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cbsa_lightning.data.images import read_header
from cbsa_lightning.data.shards import open_image


def upright_sizes(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Returns width and height of each image after its EXIF orientation is applied, without decoding pixels.

    Args:
        files: n image files.

    Returns:
        n pairs (width, height), or None for a file that is missing or whose header cannot be read.
    """
    return [_upright_size(file) for file in files]


def _upright_size(file: Path) -> tuple[int, int] | None:
    try:
        with open_image(file) as stream:
            header = read_header(stream, file)
    except Exception:  # Pillow's plugins raise many kinds of errors
        return None
    return (header.height, header.width) if header.turned else (header.width, header.height)
