"""Image bytes: sound small files of every format and mode, damaged blindly or with knowledge of the format."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from cbsa_lightning.data.images import decode
from fuzz.harness import Case, Silence, Target
from fuzz.mutations import Rng, damage_bytes, pick

PIXELS = 250_000  # limit on the size of an image here: a changed header may ask for gigabytes


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def sound_images() -> dict[str, list[bytes]]:
    """Format -> small files of it: every mode, and all that such a file may carry beside pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (11, 13, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    gray, bits, palette = rgb.convert("L"), rgb.convert("1"), rgb.quantize(16)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    smooth = rgb.resize((48, 40), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "made up", 0x8769: {0x9003: "2020:01:01 00:00:00"}})
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    texts = PngImagePlugin.PngInfo()
    texts.add_text("a", "b")
    texts.add_text("c", "d" * 99, zip=True)
    texts.add_itxt("e", "ü" * 40, zip=True)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    return {
        "JPEG": [
            _saved(smooth, "JPEG"),
            _saved(smooth, "JPEG", progressive=True, exif=exif, icc_profile=icc, comment=b"a"),
            _saved(smooth.convert("L"), "JPEG", optimize=True, restart_marker_rows=1),
            _saved(smooth.convert("CMYK"), "JPEG"),
            _saved(smooth, "JPEG", subsampling="4:4:4", dpi=(72, 72), exif=exif),
            _saved(smooth, "MPO", save_all=True, append_images=[smooth]),
        ],
        "PNG": [
            _saved(rgb, "PNG", pnginfo=texts, exif=exif, icc_profile=icc),
            _saved(rgb, "PNG", transparency=(9, 8, 7), dpi=(72, 72)),
            *[_saved(image, "PNG") for image in (rgba, gray, bits, deep, rgba.convert("LA"))],
            _saved(palette, "PNG", transparency=bytes(range(16))),
            _saved(rgba, "PNG", save_all=True, append_images=[rgba.rotate(90)]),
        ],
        "GIF": [
            _saved(palette, "GIF", **frames),
            _saved(gray, "GIF", transparency=3),
            _saved(rgb, "GIF", comment=b"a"),
        ],
        "WEBP": [
            _saved(rgb, "WEBP", exif=exif, icc_profile=icc),
            _saved(rgba, "WEBP", lossless=True),
            _saved(rgba, "WEBP", **frames),
        ],
        "BMP": [_saved(image, "BMP") for image in (rgb, rgba, gray, bits, palette)],
        "TIFF": [
            *[_saved(image, "TIFF") for image in (rgb, rgba, gray, bits, palette, deep, rgb.convert("CMYK"))],
            *[_saved(rgb, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")],
            _saved(bits, "TIFF", compression="group4"),
            _saved(Image.fromarray(noise[..., 0].astype(np.float32)), "TIFF"),
            _saved(Image.fromarray(noise[..., 0].astype(np.int32) - 100), "TIFF"),
            _saved(rgb, "TIFF", icc_profile=icc, dpi=(72, 72), description="made up", **frames),
            _saved(rgb.convert("LAB"), "TIFF"),
        ],
        "PPM": [
            *[_saved(image, "PPM") for image in (rgb, gray, bits, deep)],
            b"P3\n# remark\n2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
            b"P2 2 2 15 1 2 3 4\n",
            b"P1 3 2 101010\n",
            b"P6 1 1 65535\n\0\1\0\2\0\3",
            b"Pf 2 2 -1.0\n" + np.arange(4, dtype="<f4").tobytes(),
            b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n\1\2\3",
        ],
        "JPEG2000": [
            *[_saved(image, "JPEG2000") for image in (rgb, rgba, gray, deep)],
            _saved(smooth, "JPEG2000", no_jp2=True),
            _saved(smooth, "JPEG2000", tile_size=(16, 16), quality_layers=[20, 5], progression="RPCL"),
        ],
    }


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with its right length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _inflated(content: bytes) -> bytes:
    try:
        return zlib.decompress(content)
    except zlib.error:
        return content


def _damage_png(rng: Rng, content: bytes) -> bytes:
    """Chunks changed, moved, doubled or taken out; checksums are right, or Pillow would look no further."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(int(rng.integers(1, 4))):
        k = int(rng.integers(len(chunks)))
        kind, inside = chunks[k]
        what = rng.integers(6)
        if what == 0:
            chunks.insert(int(rng.integers(len(chunks) + 1)), chunks[k])
        elif what == 1 and len(chunks) > 1:
            del chunks[k]
        elif what == 2:
            name = pick(rng, (b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"gAMA", b"zTXt", b"IHDR"))
            chunks[k] = (name, inside)
        elif what == 3 and kind == b"IDAT":
            damaged = damage_bytes(rng, _inflated(inside), 2)
            chunks[k] = (kind, zlib.compress(damaged))
        else:
            chunks[k] = (kind, damage_bytes(rng, inside, 2))
    return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _damage_jpeg(rng: Rng, content: bytes) -> bytes:
    """One segment changed, doubled or taken out, with its right length."""
    segments, at = [], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        segments.append((content[at + 1], content[at + 4 : at + 2 + length]))
        at += 2 + length
    if not segments:
        return damage_bytes(rng, content)
    k = int(rng.integers(len(segments)))
    marker, inside = segments[k]
    what = rng.integers(5)
    if what == 0:
        segments.insert(int(rng.integers(len(segments))), segments[k])
    elif what == 1:
        del segments[k]
    elif what == 2:
        segments[k] = (int(pick(rng, (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE))), inside)
    else:
        segments[k] = (marker, damage_bytes(rng, inside, 3)[:65_000])
    head = b"".join(struct.pack(">BBH", 0xFF, m, len(s) + 2) + s for m, s in segments)
    return content[:2] + head + content[at:]


def _damage_tiff(rng: Rng, content: bytes) -> bytes:
    """Entries of the first directory changed: tag, type, count or value."""
    if content[:4] != b"II*\0":
        return damage_bytes(rng, content)
    data = bytearray(content)
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    for _ in range(int(rng.integers(1, 4))):
        at = start + 2 + 12 * int(rng.integers(entries))
        what = rng.integers(4)
        if what == 0:
            struct.pack_into(
                "<H", data, at, int(pick(rng, (256, 257, 258, 259, 262, 273, 277, 279, 284, 317, 320, 339)))
            )
        elif what == 1:
            struct.pack_into("<H", data, at + 2, int(rng.integers(0, 19)))
        else:
            value = int(pick(rng, (0, 1, 2, 3, 5, 8, 16, 32, 255, 65_535, 2**31, 2**32 - 1, int(rng.integers(99_999)))))
            struct.pack_into("<I", data, at + (4 if what == 2 else 8), value)
    return bytes(data)


_KNOWING = {"PNG": _damage_png, "JPEG": _damage_jpeg, "TIFF": _damage_tiff}


class ImageBytes(Target):
    """``decode`` on damaged image files."""

    name, share = "image bytes", 30

    def prepare(self, folder: Path) -> None:
        """Lowers Pillow's limit on the size of images."""
        Image.MAX_IMAGE_PIXELS = PIXELS

    def draw(self, rng: Rng) -> Case:
        """A damaged file, or two of them in one, or noise; the name need not be that of the format."""
        kinds = sound_images()
        kind = pick(rng, list(kinds))
        content = pick(rng, kinds[kind])
        chance = rng.random()
        if chance < 0.4 and kind in _KNOWING:
            content = _KNOWING[kind](rng, content)
        elif chance < 0.43:
            other = pick(rng, kinds[pick(rng, list(kinds))])
            content = content[: int(rng.integers(len(content)))] + other[int(rng.integers(len(other))) :]
        elif chance < 0.45:
            content = content[: int(rng.integers(12))] + rng.bytes(int(rng.integers(300)))
        elif chance < 0.98:
            content = damage_bytes(rng, content)
        name = f"picture {kind}.{pick(rng, ('jpg', 'png', 'tif'))}"
        return Case({name: content}, {"at_least": pick(rng, (None, None, 2, 20))})

    def run(self, case: Case, folder: Path) -> None:
        """Decodes it; the array must have the size that the file states."""
        (name,) = case.files
        array = decode(folder / name, case.options["at_least"])
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.flags.c_contiguous:
            raise Silence(f"{array.dtype} {array.shape}")
        try:
            with Image.open(folder / name) as image:
                stated = image.size
        except (UnidentifiedImageError, OSError) as error:
            raise Silence(f"decoded what Pillow does not open: {error}") from error
        if case.options["at_least"] is None and sorted(stated) != sorted(array.shape[:2]):
            raise Silence(f"decoded to {array.shape}, but the file states {stated}")
