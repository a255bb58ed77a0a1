"""Converts images and plots to data URIs, which are embedded in the page."""

from __future__ import annotations

import base64
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from cbsa_lightning.data.images import decode
from cbsa_lightning.errors import CBSAError

SIDE = 120
_QUALITY = 70


@lru_cache(maxsize=1024)
def thumbnail(file: Path) -> str | None:
    """Returns a JPEG thumbnail of at most 120 x 120 pixels as a data URI; None if the image cannot be read."""
    try:
        image = Image.fromarray(decode(file, at_least=SIDE))
    except (CBSAError, OSError, ValueError):  # an invalid file name raises ValueError
        return None
    image.thumbnail((SIDE, SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return data_uri(buffer.getvalue(), "image/jpeg")


def picture(file: Path) -> str | None:
    """Returns a PNG file as a data URI; None if the file does not exist."""
    return data_uri(file.read_bytes(), "image/png") if file.is_file() else None


def data_uri(content: bytes, kind: str) -> str:
    """Encodes the bytes of an image as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
