from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cbsa_lightning.data.annotations import AnnotationTable
from cbsa_lightning.data.images import ImageFiles, decode
from cbsa_lightning.data.views import PlainView
from cbsa_lightning.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_rgb_is_unchanged(tmp_path):
    array = decode(saved(tmp_path / "a.png", Image.fromarray(RGB)))
    assert array.dtype == np.uint8
    assert array.flags.writeable
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, RGB)
    np.testing.assert_array_equal(decode(str(tmp_path / "a.png")), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(RGB), exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode(path), expected)
    assert decode(path).shape == ((6, 9, 3) if orientation < 5 else (9, 6, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_is_ignored(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    np.testing.assert_array_equal(decode(path), RGB)


def test_grey_is_repeated_over_the_channels(tmp_path):
    array = decode(saved(tmp_path / "a.png", Image.fromarray(RGB[..., 0])))
    np.testing.assert_array_equal(array, np.repeat(RGB[..., :1], 3, axis=2))


def test_bilevel_is_black_and_white(tmp_path):
    array = decode(saved(tmp_path / "a.png", Image.fromarray(RGB[..., 0] > 127)))
    np.testing.assert_array_equal(array[..., 2], np.where(RGB[..., 0] > 127, 255, 0))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    gray = np.array([[0, 128, 129, 257], [32768, 65407, 65408, 65535]], dtype=np.uint16)
    array = decode(saved(tmp_path / name, Image.fromarray(gray)))
    expected = np.floor(gray / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(array, np.repeat(expected[..., None], 3, axis=2))


def test_palette_colors_are_looked_up(tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    array = decode(saved(tmp_path / "a.png", image))
    np.testing.assert_array_equal(array, np.asarray(image.convert("RGB")))


def test_cmyk_is_converted(tmp_path):
    image = Image.new("CMYK", (4, 3), (255, 0, 0, 0))
    array = decode(saved(tmp_path / "a.tif", image))
    np.testing.assert_array_equal(array, np.broadcast_to([0, 255, 255], (3, 4, 3)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_blended_with_white(tmp_path, mode):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255  # black: transparent, half, opaque
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        image.putpalette([0] * 9)
        path = saved(tmp_path / "a.png", image, transparency=bytes([0, 128, 255]))
    else:
        path = saved(tmp_path / "a.png", Image.fromarray(pixels).convert(mode))
    np.testing.assert_array_equal(decode(path), np.array([[[255] * 3, [127] * 3, [0] * 3]]))


def test_one_transparent_color_becomes_white(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (2, 2), (9, 8, 7)), transparency=(9, 8, 7))
    assert (decode(path) == 255).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(path), np.broadcast_to([255, 0, 0], (4, 5, 3)))


def jpeg(size=(200, 150)):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"<html>404 not found</html>", "cannot be read as an image"),
        (jpeg()[:5000], "truncated"),
        (jpeg()[:10], "cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot be read as an image"),
    ],
)
def test_unreadable_files_raise_errors_with_name_and_remedy(tmp_path, content, message):
    path = tmp_path / "2008_000123.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        decode(path)
    assert str(path) in str(caught.value)
    assert "download or copy the file again" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"none\.jpg: the file does not exist; check the image root"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="is a folder, not a file"):
        decode(tmp_path)


def test_floating_point_and_out_of_range_pixels_are_refused(tmp_path):
    with pytest.raises(DataError, match="an unknown range"):
        decode(saved(tmp_path / "f.tif", Image.fromarray(np.ones((2, 2), np.float32))))
    with pytest.raises(DataError, match="from -1 to 70000"):
        decode(saved(tmp_path / "i.tif", Image.fromarray(np.array([[-1, 70000]], np.int32))))


@pytest.mark.parametrize("limit", [6 * 9 - 1, (6 * 9 - 1) // 2])  # Pillow warns above it, raises above twice it
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    path = saved(tmp_path / "bomb.png", Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"bomb\.png: the image is too large to decode safely.*MAX_IMAGE_PIXELS"):
        decode(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(path).shape == (6, 9, 3)


def encoded(kind):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in {"JPEG", "PNG", "WEBP", "TIFF"} else {}
    Image.fromarray(RGB).save(buffer, kind, **options)
    return buffer.getvalue()


SOUND = [encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]


@st.composite
def damaged(draw):
    """Returns a valid file with some bytes changed or truncated, which reaches deeper into Pillow than noise."""
    data = bytearray(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged metadata; only the outcome matters
@settings(deadline=None, max_examples=400)
@given(content=st.one_of(st.binary(max_size=300), damaged()), at_least=st.sampled_from([None, None, 2]))
def test_any_bytes_yield_an_rgb_array_or_a_data_error(tmp_path_factory, content, at_least):
    path = tmp_path_factory.getbasetemp() / "any-bytes.img"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 250_000)  # a changed header may require gigabytes
        try:
            array = decode(path, at_least)
        except DataError as error:
            array, message = None, str(error)
    if array is None:
        assert str(path) in message
    else:
        assert (array.dtype, array.ndim, array.shape[2]) == (np.uint8, 3, 3)
        assert array.size > 0


# Files that expand to much more than their size --------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *extra, rows=None):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(4 * 13)) if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + rows + chunk(b"IEND", b"")


def gif(canvas, frame):
    head = b"GIF89a" + struct.pack("<HHBBB", canvas, canvas, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\x00;"


def patched(kind, find, offset, form, *values, **options):
    """Returns a valid file whose size is overwritten ``offset`` bytes after ``find``."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind, **options)
    data = bytearray(buffer.getvalue())
    struct.pack_into(form, data, data.index(find) + offset, *values)
    return bytes(data)


MEGABYTES = zlib.compress(bytes(100 << 20), 9)
BOMBS = {
    "size.png": (png(100_000, 100_000), "too large to decode safely"),
    "text.png": (png(4, 4, chunk(b"zTXt", b"a\0\0" + MEGABYTES)), "Decompressed data too large"),
    "itxt.png": (png(4, 4, chunk(b"iTXt", b"a\0\1\0\0\0" + MEGABYTES)), "Decompressed data too large"),
    "iccp.png": (png(4, 4, chunk(b"iCCP", b"a\0\0" + MEGABYTES)), "Decompressed data too large"),
    "canvas.gif": (gif(65_535, 65_535), "too large to decode safely"),
    "frame.gif": (gif(2, 65_535), "too large to decode safely"),
    "size.webp": (patched("WEBP", b"VP8L", 9, "<I", (1 << 28) - 1, lossless=True), "too large to decode safely"),
    "size.tif": (patched("TIFF", b"\0\1\4\0\1\0\0\0\x10\0\0\0", 8, "<I", 2**31 - 1), "too large|cannot be read"),
    "box.jp2": (patched("JPEG2000", b"ihdr", 4, ">II", 10**6, 10**6), "too large to decode safely"),
    "stream.jp2": (patched("JPEG2000", b"\xff\x51", 6, ">II", 10**6, 10**6), "cannot be read as an image"),
    "stream.j2k": (
        patched("JPEG2000", b"\xff\x51", 6, ">II", 10**6, 10**6, no_jp2=True),
        "too large to decode safely",
    ),
    "size.bmp": (patched("BMP", b"BM", 18, "<ii", 10**6, 10**6), "too large to decode safely"),
    "size.ppm": (b"P6 100000 100000 255\n", "too large to decode safely"),
    "size.jpg": (patched("JPEG", b"\xff\xc0", 5, ">HH", 65_535, 65_535), "too large to decode safely"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("at_least", [None, 224])
def test_bombs_of_every_format_are_refused_before_decompression(tmp_path, name, at_least):
    content, message = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message) as error:
        decode(path, at_least)
    assert str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_xml_inside_an_image_is_not_expanded(tmp_path):
    """No reader parses XML; Pillow searches its text for an orientation."""
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    laughs = f'<!DOCTYPE x [<!ENTITY a0 "lol">{entities}]><x tiff:Orientation="6">&a11;</x>'.encode()
    path = tmp_path / "xmp.png"
    path.write_bytes(png(4, 4, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + laughs)))
    assert decode(path).shape == (4, 4, 3)


def test_pixels_outside_the_image_are_not_decompressed(tmp_path):
    path = tmp_path / "rows.png"
    path.write_bytes(png(4, 4, rows=MEGABYTES))
    assert (decode(path) == 0).all()


# Decoding at a fraction of the size --------------------------------------------------------------------------------


def photograph(size, mode="RGB"):
    """Returns smooth noise like a photograph: enlarged coarse colors."""
    coarse = RNG.integers(0, 256, (6, 8, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    return Image.fromarray(coarse.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (481, 640), (447, 449), (1000, 225), (1791, 1793), (100, 90)]
)
@pytest.mark.parametrize("at_least", [1, 50, 224, 448])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_keeps_both_sides(tmp_path, width, height, at_least):
    path = saved(tmp_path / "a.jpg", photograph((width, height)))
    scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(width, height) >= s * at_least)
    array = decode(path, at_least)
    assert array.shape == (-(-height // scale), -(-width // scale), 3)
    if scale == 1:
        np.testing.assert_array_equal(array, decode(path))
        return
    assert min(array.shape[:2]) >= at_least
    assert (array.dtype, array.flags.writeable, array.flags.c_contiguous) == (np.uint8, True, True)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB").reduce(scale)).astype(int)
    assert np.abs(array - expected).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_smaller_decoding_keeps_orientation_and_colors(tmp_path, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.jpg", photograph((640, 480), mode), exif=exif, quality=95)
    whole, half = decode(path), decode(path, 240)
    assert half.shape == (whole.shape[0] // 2, whole.shape[1] // 2, 3)
    expected = np.asarray(Image.fromarray(whole).reduce(2)).astype(int)
    assert np.abs(half - expected).mean() < 1.5


def test_several_jpegs_in_one_file(tmp_path):
    pictures = [photograph((640, 480)) for _ in range(2)]
    path = saved(tmp_path / "a.jpg", pictures[0], format="MPO", save_all=True, append_images=pictures[1:])
    assert decode(path).shape == (480, 640, 3)
    assert np.abs(decode(path, 240) - np.asarray(pictures[0].reduce(2)).astype(int)).mean() < 2


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.gif", "a.tif", "a.ppm", "a.jp2"])
def test_other_formats_are_always_decoded_at_full_size(tmp_path, name):
    path = saved(tmp_path / name, photograph((64, 48)))
    np.testing.assert_array_equal(decode(path, 8), decode(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_jpeg_is_refused_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.jpg", photograph((640, 480)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(DataError, match=r"a\.jpg: .*truncated"):
        decode(path, 60)
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 480 - 1)  # the size of the whole image is checked
    with pytest.raises(DataError, match="too large to decode safely"):
        decode(path, 60)


def test_images_of_a_table_by_row(tmp_path):
    names = ["a.jpg", "b.jpg", "c.jpg"]
    whole = [decode(saved(tmp_path / name, photograph((90, 80)))) for name in names]
    paths = np.array(names, dtype=np.dtypes.StringDType())
    files = ImageFiles(AnnotationTable(tmp_path, paths, np.zeros((3, 1), np.int8), ("class",)))
    np.testing.assert_array_equal(files[1], whole[1])
    np.testing.assert_array_equal(files.select(np.array([2, 0]))[0], whole[2])
    assert ImageFiles(files.table, 40).select(np.array([2]))[0].shape == (40, 45, 3)


@pytest.mark.parametrize("folder", ["coco-small/images", "voc2012-animals/VOCdevkit/VOC2012/JPEGImages"])
def test_views_of_real_photographs_decoded_at_half_size_are_close(realbench, folder):
    """112 to a short side of 256 pixels is similar to 224 to 480, the sizes of views and COCO."""
    view = PlainView(112)
    differences = []
    for path in sorted((realbench / folder).glob("*.jpg"))[:150]:
        whole, half = (view(decode(path, at_least)).numpy().astype(int) for at_least in (None, 112))
        differences.append(np.abs(whole - half))
        np.testing.assert_array_equal(decode(path, 129), decode(path))  # twice 129 is more than 256
    means = np.array([difference.mean() for difference in differences])
    print(f"gray levels: mean {means.mean():.2f}, of the worst image {means.max():.2f}, max {np.max(differences)}")
    assert 0.5 < means.mean() < 2.5
    assert means.max() < 8
    assert np.max(differences) < 110


def test_real_photographs(realbench):
    paths = sorted((realbench / "coco-small" / "images").glob("*.jpg"))[:5]
    assert paths
    for path in paths:
        with Image.open(path) as image:
            np.testing.assert_array_equal(decode(path), np.asarray(image.convert("RGB")))
