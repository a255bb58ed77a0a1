"""Slow recomputations of the operations of RandAugment from their definitions, pixel by pixel and without Pillow.

Images are (H, W, 3) uint8 arrays. Blends use float64, so results may differ from Pillow by one gray level.
"""

from __future__ import annotations

import math

import numpy as np

GREY = 128


def _truncated(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def luma(image):
    """Returns ITU-R 601 luma in 16-bit fixed point, as integers."""
    red, green, blue = (image[..., c].astype(np.int64) for c in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def invert(image):
    return 255 - image


def posterize(image, bits):
    return image // 2 ** (8 - bits) * 2 ** (8 - bits)


def solarize(image, threshold):
    return np.where(image < threshold, image, 255 - image)


def brightness(image, factor):
    return _truncated(image * factor)


def contrast(image, factor):
    mean = int(luma(image).mean() + 0.5)
    return _truncated(mean + factor * (image.astype(float) - mean))


def color(image, factor):
    gray = luma(image)[..., None]
    return _truncated(gray + factor * (image.astype(float) - gray))


def sharpness(image, factor):
    """Blends a smoothed copy (weights 1, the center 5, over 13; borders unchanged) and the image."""
    height, width, _ = image.shape
    smooth = image.astype(float)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            window = image[y - 1 : y + 2, x - 1 : x + 2].astype(float)
            total = window.sum(axis=(0, 1)) + 4 * window[1, 1]
            smooth[y, x] = np.floor(total / 13 + 0.5)
    return _truncated(smooth + factor * (image - smooth))


def autocontrast(image):
    out = np.empty_like(image)
    for c in range(3):
        low, high = int(image[..., c].min()), int(image[..., c].max())
        scale = 255 / (high - low)
        out[..., c] = _truncated(image[..., c] * scale - low * scale)
    return out


def equalize(image):
    """Maps each channel through its own cumulative histogram."""
    out = np.empty_like(image)
    for c in range(3):
        counts = [int((image[..., c] == value).sum()) for value in range(256)]
        last = [count for count in counts if count][-1]
        step = (sum(counts) - last) // 255
        table, before = [], step // 2
        for count in counts:
            table.append(min(255, before // step))
            before += count
        out[..., c] = np.array(table)[image[..., c]]
    return out


def cutout(image, size, x, y):
    """Paints the pixels from -half to +half (exclusive) around (x, y), with half = ``size // 2``."""
    out = image.copy()
    half = size // 2
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            if -half <= row - y < half and -half <= column - x < half:
                out[row, column] = 125, 122, 113
    return out


def translate(image, right, down):
    """Computes out(x, y) = in(x + right, y + down), nearest pixel; gray outside."""
    height, width, _ = image.shape
    out = np.full_like(image, GREY)
    for y in range(height):
        for x in range(width):
            source_x, source_y = math.floor(x + 0.5 + right), math.floor(y + 0.5 + down)
            if 0 <= source_x < width and 0 <= source_y < height:
                out[y, x] = image[source_y, source_x]
    return out


def rotate(image, degrees):
    """Rotates counter-clockwise about the center, nearest pixel; gray outside."""
    height, width, _ = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    out = np.full_like(image, GREY)
    for y in range(height):
        for x in range(width):
            dx, dy = x + 0.5 - width / 2, y + 0.5 - height / 2
            source_x = math.floor(cos * dx - sin * dy + width / 2)
            source_y = math.floor(sin * dx + cos * dy + height / 2)
            if 0 <= source_x < width and 0 <= source_y < height:
                out[y, x] = image[source_y, source_x]
    return out


def _cubic(distance):
    """Cubic convolution with a = -1, as in Pillow's transforms (its resize uses -0.5)."""
    t, a = abs(distance), -1.0
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def shear(image, slope_x, slope_y):
    """Computes out(x, y) = in(x + slope_x y, y + slope_y x) at pixel centers, bicubic; gray outside."""
    height, width, _ = image.shape
    out = np.full_like(image, GREY)
    for y in range(height):
        for x in range(width):
            at_x = x + 0.5 + slope_x * (y + 0.5)
            at_y = y + 0.5 + slope_y * (x + 0.5)
            if not (0 <= at_x < width and 0 <= at_y < height):
                continue
            left, top = math.floor(at_x - 0.5), math.floor(at_y - 0.5)
            value = np.zeros(3)
            for row in range(top - 1, top + 3):
                for column in range(left - 1, left + 3):
                    weight = _cubic(at_y - 0.5 - row) * _cubic(at_x - 0.5 - column)
                    value += weight * image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            out[y, x] = _truncated(np.floor(value + 0.5))
    return out
