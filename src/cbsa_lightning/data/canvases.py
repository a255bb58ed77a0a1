"""Generation of small, cluttered color scenes that show scikit-learn's handwritten digits.

All positions and colors depend only on the given random generator. `cbsa_lightning.data.readers.digits` determines
which digits an image contains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color: TypeAlias = tuple[int, int, int]
Part: TypeAlias = Literal["train", "test", "pretrain"]

# All scenes use the same ink colors, so that the color of a digit does not reveal its class.
INKS: tuple[Color, ...] = (
    (255, 250, 240), (255, 214, 79), (255, 138, 101), (240, 98, 146), (128, 222, 234), (174, 234, 120),
    (40, 44, 72), (120, 30, 60), (20, 80, 84), (84, 46, 20),
)  # fmt: skip


MARGIN = 2  # pixels around an 8 x 8 exemplar, so that a rotated digit stays inside its mask


class Exemplars(NamedTuple):
    """Handwritten digits, with ``images`` (n, 8, 8) float32 in [0, 1] and ``digits`` (n,) int64 from 0 to 9."""

    images: np.ndarray
    digits: np.ndarray


@cache
def exemplars(part: Part) -> Exemplars:
    """Returns the handwritten digits for the canvases of one part of the data.

    Half of the exemplars of each digit are used in training canvases, a quarter in test canvases, and a quarter for
    training the embedded CLIP model. This split is fixed and does not depend on a seed, so the parts never overlap.
    """
    from sklearn.datasets import load_digits  # imported here because it is slow to import

    data = load_digits()
    residues = {"train": (0, 2), "test": (1,), "pretrain": (3,)}[part]
    rank = np.zeros(len(data.target), dtype=np.int64)  # index of an exemplar among those of its digit
    for digit in range(10):
        where = np.flatnonzero(data.target == digit)
        rank[where] = np.arange(len(where))
    chosen = np.isin(rank % 4, residues)
    return Exemplars((data.images[chosen] / 16.0).astype(np.float32), data.target[chosen].astype(np.int64))


def handwritten(image: np.ndarray, pixels: int, angle: float, shear: float) -> Image.Image:
    """Converts an 8 x 8 exemplar to a smooth mask (mode "L") of side ``pixels``, rotated by ``angle`` radians."""
    source = Image.fromarray(np.pad(image, MARGIN).astype(np.float32))
    step = (8 + 2 * MARGIN) / pixels
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    a, b, c, d = cos, sin + shear * cos, -sin, cos - shear * sin
    center_in, center_out = 4 + MARGIN, pixels / 2
    matrix = (a, b, center_in - (a + b) * center_out, c, d, center_in - (c + d) * center_out)
    size = (pixels, pixels)
    gray = np.asarray(source.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
    edge = np.clip((gray - 0.28) / 0.3, 0.0, 1.0)  # the soft threshold sharpens the strokes
    return Image.fromarray((255 * edge * edge * (3 - 2 * edge)).astype(np.uint8))


def paste(canvas: Image.Image, mask: Image.Image, center: tuple[float, float], ink: Color, opacity: float) -> None:
    """Draws ``mask`` onto ``canvas`` in the color ``ink``, with a thin halo that keeps it readable."""
    corner = (round(center[0] - mask.width / 2), round(center[1] - mask.height / 2))
    halo = (24, 26, 44) if sum(ink) > 384 else (250, 244, 232)
    wide = mask.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(1.2))
    nothing = Image.new("L", mask.size)
    canvas.paste(halo, corner, Image.blend(nothing, wide, 0.7 * opacity))
    canvas.paste(ink, corner, Image.blend(nothing, mask, opacity))


def places(rng: np.random.Generator, size: int, widths: Sequence[int]) -> list[tuple[float, float]]:
    """Draws random centers of square masks. The masks are inside the canvas and hardly overlap."""
    chosen: list[tuple[float, float]] = []
    for width in widths:
        low, high = 0.42 * width, size - 0.42 * width
        tries = rng.uniform(low, high, size=(40, 2))
        gaps = [
            min(
                (math.dist(point, other) - 0.4 * (width + w) for other, w in zip(chosen, widths, strict=False)),
                default=0.0,
            )
            for point in tries
        ]
        best = next((i for i, gap in enumerate(gaps) if gap >= 0), int(np.argmax(gaps)))
        chosen.append((float(tries[best][0]), float(tries[best][1])))
    return chosen


def shade(rng: np.random.Generator, color: Color, spread: int = 18) -> Color:
    """Draws a random color that is similar to ``color``."""
    r, g, b = (
        min(max(value + change, 0), 255)
        for value, change in zip(color, rng.integers(-spread, spread + 1, 3).tolist(), strict=True)
    )
    return r, g, b


def gradient(size: int, top: Color, bottom: Color) -> Image.Image:
    """Creates a canvas with a vertical color gradient."""
    ramp = np.linspace(0, 1, size)[:, None, None]
    rows = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))


def meadow(rng: np.random.Generator, size: int) -> Image.Image:
    """Draws hills with trees and flowers below a light sky."""
    canvas = gradient(size, shade(rng, (150, 205, 235)), shade(rng, (240, 236, 200)))
    draw = ImageDraw.Draw(canvas)
    xs = np.linspace(0, size, 24)
    for level, green in zip((0.35, 0.52, 0.72), ((126, 176, 104), (92, 150, 84), (60, 118, 74)), strict=True):
        ys = size * (level + 0.07 * np.sin(xs / size * rng.uniform(3, 8) + rng.uniform(0, 6)))
        hill = list(zip(xs.tolist(), ys.tolist(), strict=True))
        draw.polygon([*hill, (size, size), (0, size)], fill=shade(rng, green))
        for _ in range(rng.integers(2, 5)):
            at = int(rng.integers(len(xs)))
            x, y, r = xs[at], ys[at], size * rng.uniform(0.025, 0.06)
            draw.rectangle((x - 1, y - r, x + 1, y + r / 2), fill=(104, 74, 52))
            draw.ellipse((x - r, y - 2.6 * r, x + r, y - 0.6 * r), fill=shade(rng, (72, 128, 62), 30))
    for x, y in rng.uniform((0, 0.55), 1, size=(26, 2)) * size:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=INKS[rng.integers(6)])
    return canvas


def harbour(rng: np.random.Generator, size: int) -> Image.Image:
    """Draws sailing boats on waves."""
    canvas = gradient(size, shade(rng, (186, 222, 240)), shade(rng, (44, 104, 158)))
    draw = ImageDraw.Draw(canvas)
    xs = np.linspace(0, size, 40)
    for row in np.linspace(0.3, 1.05, 9):
        swell = size * (row + 0.012 * np.sin(xs / size * rng.uniform(20, 34) + rng.uniform(0, 6)))
        wave = list(zip(xs.tolist(), swell.tolist(), strict=True))
        draw.polygon(
            [*wave, (size, size), (0, size)],
            fill=shade(rng, (int(115 - 62 * row), int(199 - 108 * row), int(247 - 134 * row)), 10),
        )
        if rng.random() < 0.6:
            x, y, r = rng.uniform(0, size), size * row, size * rng.uniform(0.05, 0.1)
            draw.polygon(
                [(x - r, y - r / 4), (x + r, y - r / 4), (x + r / 2, y + r / 4), (x - r / 2, y + r / 4)],
                fill=shade(rng, (150, 72, 56), 30),
            )
            draw.polygon([(x, y - 2 * r), (x, y - r / 3), (x + r, y - r / 3)], fill=shade(rng, (244, 236, 220)))
            draw.polygon(
                [(x - 2, y - 1.7 * r), (x - 2, y - r / 3), (x - r, y - r / 3)],
                fill=shade(rng, INKS[rng.integers(6)]),
            )
    return canvas


def dusk(rng: np.random.Generator, size: int) -> Image.Image:
    """Draws buildings with lit windows in front of a red evening sky."""
    canvas = gradient(size, shade(rng, (62, 48, 112)), shade(rng, (246, 150, 110)))
    draw = ImageDraw.Draw(canvas)
    x, y, r = rng.uniform(0.1, 0.9) * size, rng.uniform(0.1, 0.3) * size, rng.uniform(0.05, 0.1) * size
    draw.ellipse((x - r, y - r, x + r, y + r), fill=shade(rng, (255, 232, 176)))
    for level, wall in zip((0.5, 0.75), ((110, 78, 124), (62, 50, 92)), strict=True):
        left = -rng.uniform(0, 0.1) * size
        while left < size:
            width, top = size * rng.uniform(0.1, 0.22), size * (level + rng.uniform(-0.16, 0.12))
            draw.rectangle((left, top, left + width, size), fill=shade(rng, wall))
            for wx in np.arange(left + 4, left + width - 4, 8):
                for wy in np.arange(top + 5, size, 11):
                    if rng.random() < 0.35:
                        draw.rectangle((wx, wy, wx + 3, wy + 4), fill=shade(rng, (250, 206, 120)))
            left += width + rng.uniform(0, 0.05) * size
    return canvas


SCENES: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "meadow": meadow,
    "harbour": harbour,
    "dusk": dusk,
}


class Canvas(NamedTuple):
    """An image, and the square ``(left, top, right, bottom)`` in pixels around each of its digits."""

    image: Image.Image
    boxes: dict[int, tuple[float, float, float, float]]


def draw_canvas(rng: np.random.Generator, size: int, scene: str, digits: Sequence[int], source: Exemplars) -> Canvas:
    """Draws a scene that contains each of ``digits`` once, as well as faint fragments of other digits.

    Args:
        rng: Random generator for everything that the other arguments do not determine.
        size: Height and width in pixels.
        scene: A key of `SCENES`.
        digits: The digits to draw, from 0 to 9, without repetitions.
        source: The exemplars to draw with.
    """
    canvas = SCENES[scene](rng, size)
    for x, y in rng.uniform(0, size, size=(rng.integers(0, 3), 2)):  # fragments that do not form a digit
        mask = _glyph(rng, source, int(rng.integers(len(source.digits))), size)
        w = mask.width
        cut = [(0, 0, w, w // 2), (0, w // 2, w, w), (0, 0, w // 2, w), (w // 2, 0, w, w)][rng.integers(4)]
        paste(canvas, mask.crop(cut), (x, y), INKS[rng.integers(len(INKS))], rng.uniform(0.15, 0.35))
    masks = [_glyph(rng, source, int(rng.choice(np.flatnonzero(source.digits == digit))), size) for digit in digits]
    boxes = {}
    centers = places(rng, size, [mask.width for mask in masks])
    for digit, mask, (x, y) in zip(digits, masks, centers, strict=True):
        paste(canvas, mask, (x, y), INKS[rng.integers(len(INKS))], rng.uniform(0.85, 1.0))
        half = mask.width * 8 / (8 + 2 * MARGIN) / 2
        boxes[digit] = (x - half, y - half, x + half, y + half)
    return Canvas(canvas, boxes)


def _glyph(rng: np.random.Generator, source: Exemplars, row: int, size: int) -> Image.Image:
    """Creates a mask of one exemplar with random scale, rotation and slant. The mask is wider than the digit."""
    pixels = int(size * rng.uniform(0.27, 0.42))
    return handwritten(source.images[row], pixels, rng.normal(0, 0.2), rng.normal(0, 0.15))
