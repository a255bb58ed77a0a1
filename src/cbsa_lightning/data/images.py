"""Reading of image files as RGB arrays. The error for an unreadable file contains its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.shards import open_image
from cbsa_lightning.errors import DataError

# Common image formats. MPO files are read as JPEG. The fixed list excludes formats for which Pillow starts other
# programs, such as EPS.
_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"]
if "avif" in features.modules and features.check_module("avif"):  # depends on the Pillow build
    _FORMATS.append("AVIF")

# Suffixes of unsupported files that are often stored together with photos, for error messages.
_FOREIGN = {
    "AVIF": "avif",
    "HEIC": "heic heif hif",
    "DICOM": "dcm dicom",
    "camera raw": "3fr arw cr2 cr3 crw dng erf kdc mrw nef nrw orf pef raf raw rw2 sr2 srf srw x3f",
    "video": "3gp avi m4v mkv mov mp4 mpg mts webm wmv",
    "Photoshop": "psb psd",
    "vector": "ai eps pdf svg",
    "JPEG XL": "jxl",
}
_KIND_OF = {f".{suffix}": kind for kind, suffixes in _FOREIGN.items() for suffix in suffixes.split()}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands of ISO base media files


def foreign_kind(path: str | os.PathLike[str], start: bytes = b"") -> str | None:
    """Returns the name of an unsupported format, detected from the first bytes or the suffix, or None if unknown."""
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
        return "HEIC"
    if start[128:132] == b"DICM":
        return "DICOM"
    return _KIND_OF.get(Path(path).suffix.lower())


_ORIENTATION = 0x0112  # the EXIF tag that specifies how the stored pixels must be rotated
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: str | os.PathLike[str], at_least: int | None = None) -> np.ndarray:
    """Reads an image file as an upright RGB image.

    Gray, palette, CMYK and other modes are converted, and 16-bit gray values are scaled to 8 bits. Transparent areas
    are blended with white. Only the first frame of an animation is read. The EXIF orientation is applied. Unreadable
    EXIF data is ignored, since it does not affect the pixels. A truncated file raises an error, whereas the code of
    related systems lets Pillow fill the rest with gray.

    Args:
        path: A JPEG (including MPO), PNG, WebP, BMP, GIF, TIFF, PPM or JPEG 2000 file, or AVIF if Pillow supports it.
            It may be in a shard (:mod:`cbsa_lightning.data.shards`).
        at_least: Minimum side in pixels. A JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size for
            which both sides are at least this long. This is faster than resizing the whole image, but the result is not
            identical. Other formats, and images with a side below twice this length, are read at full size. With None,
            all images are read at full size.

    Returns:
        (H, W, 3) uint8, writable and contiguous. H and W are the size in the file, or are reduced by ``at_least``.

    Raises:
        DataError: If the file is missing, empty, truncated, in another format, or larger than Pillow's
            ``MAX_IMAGE_PIXELS``, or if it has floating-point or 32-bit pixels.
    """
    name = Path(path)
    try:
        with open_image(name) as file:
            start = file.read(132)
            if not start:
                raise DataError(f"{name}: the file is empty (0 bytes); {_REMEDY}")
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as image:
                _check_size(name, image)
                if at_least is not None:
                    image.draft(None, (at_least, at_least))  # draft rounds up, so no side is too short
                image.load()
                return np.array(_to_rgb(name, _turned_upright(image)))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{name}: the file does not exist; check the image root, and whether the download is complete"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except UnidentifiedImageError as error:
        kind = foreign_kind(name, start)
        if kind is None:
            formats = ", ".join(_FORMATS)
            raise DataError(
                f"{name}: cannot be read as an image (its format is none of {formats}); {_REMEDY}"
            ) from error
        raise DataError(f"{name}: {kind} files are not supported; convert the file to JPEG or PNG") from error
    # For damaged files, Pillow's plugins can raise almost any exception, such as OSError or SyntaxError.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{name}: cannot be read as an image ({reason}); {_REMEDY}") from error


def as_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """Converts an image in memory to upright RGB, in the same way as :func:`decode` converts a file.

    Args:
        image: A Pillow image of any mode, or a uint8 array ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)`` in
            gray, RGB or RGBA.

    Returns:
        ``(H, W, 3)`` uint8, contiguous.

    Raises:
        DataError: If an array has the wrong type or shape.
    """
    if isinstance(image, Image.Image):
        return np.array(_to_rgb(Path("image"), _turned_upright(image)))
    found = f"an array of {image.dtype} and shape {image.shape}"
    if image.dtype != np.uint8:
        raise DataError(
            f"{found} has an unknown range of values; give uint8 values from 0 to 255. Convert values in [0, 1] with "
            "(255 * image).round().astype('uint8')."
        )
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.ndim == 3 and image.shape[2] == 4:
        image = np.asarray(_to_rgb(Path("image"), Image.fromarray(np.ascontiguousarray(image))))
    if image.ndim == 3 and image.shape[2] == 3 and image.size:
        return np.ascontiguousarray(image)  # torch does not support negative strides, such as those of a BGR view
    if image.ndim == 3 and image.shape[0] in (1, 3, 4):
        raise DataError(f"{found} has the channels in the first dimension; give image.transpose(1, 2, 0).")
    raise DataError(f"{found} is not an image; give (H, W), (H, W, 3) or (H, W, 4).")


class Header(NamedTuple):
    """Properties of an image file, determined from its first and last bytes.

    Attributes:
        kind: Pillow's name of the format: "JPEG", "PNG", ...
        width: Width in pixels, before the EXIF orientation is applied.
        height: Height in pixels, before the EXIF orientation is applied.
        whole: Whether the end of the file is present. If False, the file may still be complete, since some formats have
            no end marker; use :func:`decode` to find out.
        turned: Whether the EXIF orientation swaps width and height.
    """

    kind: str
    width: int
    height: int
    whole: bool
    turned: bool


def read_header(file: BinaryIO, name: Path) -> Header:
    """Reads the header and the end of an image without decoding it.

    Args:
        file: The open file, at any position.
        name: Name of the file in error messages.

    Raises:
        DataError: If the image has no pixels or too many pixels.
        Exception: If the header cannot be read. Pillow's plugins can raise almost any exception.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    file.seek(0)
    with Image.open(file, formats=_FORMATS) as image:
        _check_size(name, image)
        kind, (width, height) = image.format or "", image.size
        turned = _is_turned(image)
    if kind == "WEBP":
        file.seek(4)
        whole = int.from_bytes(file.read(4), "little") + 8 <= size
    else:
        whole = kind in _ENDS and _ENDS[kind] in tail
    return Header(kind, width, height, whole, turned)


def looks_whole(path: str | os.PathLike[str]) -> bool:
    """Returns whether an image has a readable header and its end is present, without decoding it.

    If the result is False, the image may still be complete; see :class:`Header`.
    """
    try:
        with open_image(path) as file:
            return read_header(file, Path(path)).whole
    except Exception:  # any exception, as in decode
        return False


_TAIL = 32  # bytes; files of some cameras end with padding
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}


class ImageFiles:
    """The images of a table, indexed by row. They are decoded on each access.

    Args:
        table: Table with the paths of the images.
        at_least: See :func:`decode`.
    """

    def __init__(self, table: AnnotationTable, at_least: int | None = None) -> None:
        self.table, self.at_least = table, at_least

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns the image of a row, (H, W, 3) uint8."""
        return decode(self.table.file(row), self.at_least)

    def select(self, rows: np.ndarray) -> ImageFiles:
        """Returns the images of these rows, in this order."""
        return ImageFiles(self.table.select(rows), self.at_least)


_REMEDY = "download or copy the file again, or remove the image"


def _check_size(name: Path, image: Image.Image) -> None:
    # Pillow only shows a warning for up to twice its limit, but training images should not exceed the limit either.
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise _too_large(name, f"{width} x {height} pixels, limit {limit}")
    if width * height == 0:
        raise DataError(f"{name}: the image has no pixels ({width} x {height}); {_REMEDY}")


def _too_large(name: Path, found: str) -> DataError:
    return DataError(
        f"{name}: the image is too large to decode safely ({found}); "
        "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
    )


def _turned_upright(image: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return image
    return image if method is None else image.transpose(method)


def _is_turned(image: Image.Image) -> bool:
    try:
        # The method of the base class is used, because that of PNG images decodes the whole image to find EXIF data.
        return Image.Image.getexif(image).get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # as in _turned_upright
        return False


def _to_rgb(name: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise DataError(
                f"{name}: gray values from {gray.min()} to {gray.max()} exceed 16 bits; save the image with 8 bits"
            )
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{name}: floating-point pixels have an unknown range; save the image with 8 bits")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy the image
