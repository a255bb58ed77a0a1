"""RandAugment as used by CAP, with the values of the ``randaugment`` package instead of torchvision's.

There are two slots. For each slot, one of 15 operations and one of 9 magnitudes is drawn, all with equal probability,
and the operation is applied with probability 0.5. A quarter of the images therefore remains unchanged. This module
defines the random choices and the effect of each operation on a Pillow image; the caller provides the random stream.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_GREY = (128, 128, 128)  # color of the areas that shears, translations and rotations uncover
_CUTOUT_COLOUR = (125, 122, 113)
NUM_SLOTS = 2
SLOT_PROBABILITY = 0.5


class Step(NamedTuple):
    """One operation with all of its random values.

    Attributes:
        operation: A key of :data:`OPERATIONS`.
        magnitude: Index from 1 (weakest) to 9 into the table of strengths of the operation.
        sign: -1 or 1, the direction of operations that have two directions.
        center: Center (x, y) of a cutout as a fraction of the image size, in [0, 1).
    """

    operation: str
    magnitude: int
    sign: int
    center: tuple[float, float]


def draw_steps(rng: random.Random) -> tuple[Step, ...]:
    """Draws the steps for one image: none with probability 1/4, one with 1/2, or two with 1/4."""
    steps = []
    for _ in range(NUM_SLOTS):
        if rng.random() < SLOT_PROBABILITY:
            steps.append(Step(rng.choice(_NAMES), rng.randint(1, 9), rng.choice((-1, 1)), (rng.random(), rng.random())))
    return tuple(steps)


def apply_step(image: Image.Image, step: Step) -> Image.Image:
    """Applies one step to an RGB image. The size does not change."""
    operation, strengths = OPERATIONS[step.operation]
    return operation(image, strengths[step.magnitude], step)


def _affine(
    image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling = Image.Resampling.NEAREST
) -> Image.Image:
    # The matrix maps output pixels to input pixels: x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5.
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_GREY)


def _shear_x(image: Image.Image, slope: float, step: Step) -> Image.Image:
    return _affine(image, (1, slope * step.sign, 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, slope: float, step: Step) -> Image.Image:
    return _affine(image, (1, 0, 0, slope * step.sign, 1, 0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, share: float, step: Step) -> Image.Image:
    return _affine(image, (1, 0, share * image.width * step.sign, 0, 1, 0))


def _translate_y(image: Image.Image, share: float, step: Step) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, share * image.height * step.sign))


def _rotate(image: Image.Image, degrees: float, step: Step) -> Image.Image:
    return image.rotate(degrees, fillcolor=_GREY)  # always counterclockwise, with nearest-pixel resampling


def _color(image: Image.Image, change: float, step: Step) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 + change * step.sign)


def _contrast(image: Image.Image, change: float, step: Step) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 + change * step.sign)


def _sharpness(image: Image.Image, change: float, step: Step) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + change * step.sign)


def _brightness(image: Image.Image, change: float, step: Step) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + change * step.sign)


def _posterize(image: Image.Image, bits: float, step: Step) -> Image.Image:
    return ImageOps.posterize(image, int(bits))


def _solarize(image: Image.Image, threshold: float, step: Step) -> Image.Image:
    return image.point([value if value < threshold else 255 - value for value in range(256)] * 3)


def _autocontrast(image: Image.Image, strength: float, step: Step) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float, step: Step) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, strength: float, step: Step) -> Image.Image:
    return ImageOps.invert(image)


def _cutout(image: Image.Image, size: float, step: Step) -> Image.Image:
    # The square has a side of 2 * (size // 2) pixels, regardless of the image size. It is clipped at the border.
    half = int(size) // 2
    x, y = int(step.center[0] * image.width), int(step.center[1] * image.height)
    box = (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    image = image.copy()
    image.paste(_CUTOUT_COLOUR, box)
    return image


def _table(first: float, last: float, rounded: bool = False) -> tuple[float, ...]:
    steps = np.linspace(first, last, 10)
    return tuple((steps.round() if rounded else steps).tolist())


_Operation = Callable[[Image.Image, float, Step], Image.Image]

# Mapping from name to (operation, strengths for magnitudes 0 to 9). Magnitude 0 is never drawn.
OPERATIONS: dict[str, tuple[_Operation, tuple[float, ...]]] = {
    "invert": (_invert, _table(0, 0)),
    "cutout": (_cutout, _table(0, 20, rounded=True)),  # pixels
    "sharpness": (_sharpness, _table(0, 0.9)),  # change of the factor 1
    "autocontrast": (_autocontrast, _table(0, 0)),
    "posterize": (_posterize, _table(8, 4, rounded=True)),  # bits to keep
    "shear_x": (_shear_x, _table(0, 0.3)),  # slope
    "translate_x": (_translate_x, _table(0, 150 / 331)),  # fraction of the width
    "translate_y": (_translate_y, _table(0, 150 / 331)),  # fraction of the height
    "shear_y": (_shear_y, _table(0, 0.3)),
    "rotate": (_rotate, _table(0, 30)),  # degrees
    "equalize": (_equalize, _table(0, 0)),
    "contrast": (_contrast, _table(0, 0.9)),
    "color": (_color, _table(0, 0.9)),
    "solarize": (_solarize, _table(256, 0)),  # values at or above this one are inverted
    "brightness": (_brightness, _table(0, 0.9)),
}
_NAMES = tuple(OPERATIONS)
