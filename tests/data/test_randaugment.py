from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from cbsa_lightning.data.randaugment import OPERATIONS, Step, apply_step, draw_steps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import randaugment as plain

RNG = np.random.default_rng(0)
# Smooth enough to test interpolation, not square, and without a full range for autocontrast.
WAVES = np.sin(np.arange(30)[:, None, None] * [0.2, 0.3, 0.1] + np.arange(41)[None, :, None] * [0.1, 0.25, 0.3])
IMAGE = (120 + 90 * WAVES + RNG.integers(-15, 16, WAVES.shape)).astype(np.uint8)
HEIGHT, WIDTH = IMAGE.shape[:2]
CENTRE = (0.3, 0.8)
BLENDED = {"sharpness", "contrast", "color", "brightness", "autocontrast"}  # computed in floating point

# The tables of the fact sheet (B5).
POSTERIZE_BITS = [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
CUTOUT_PIXELS = [0, 2, 4, 7, 9, 11, 13, 16, 18, 20]

EXPECTED = {
    "invert": lambda k, sign: plain.invert(IMAGE),
    "cutout": lambda k, sign: plain.cutout(IMAGE, CUTOUT_PIXELS[k], int(0.3 * WIDTH), int(0.8 * HEIGHT)),
    "sharpness": lambda k, sign: plain.sharpness(IMAGE, 1 + sign * k / 10),
    "autocontrast": lambda k, sign: plain.autocontrast(IMAGE),
    "posterize": lambda k, sign: plain.posterize(IMAGE, POSTERIZE_BITS[k]),
    "shear_x": lambda k, sign: plain.shear(IMAGE, sign * k / 30, 0),
    "shear_y": lambda k, sign: plain.shear(IMAGE, 0, sign * k / 30),
    "translate_x": lambda k, sign: plain.translate(IMAGE, sign * k / 9 * 150 / 331 * WIDTH, 0),
    "translate_y": lambda k, sign: plain.translate(IMAGE, 0, sign * k / 9 * 150 / 331 * HEIGHT),
    "rotate": lambda k, sign: plain.rotate(IMAGE, k * 30 / 9),
    "equalize": lambda k, sign: plain.equalize(IMAGE),
    "contrast": lambda k, sign: plain.contrast(IMAGE, 1 + sign * k / 10),
    "color": lambda k, sign: plain.color(IMAGE, 1 + sign * k / 10),
    "solarize": lambda k, sign: plain.solarize(IMAGE, 256 - k * 256 / 9),
    "brightness": lambda k, sign: plain.brightness(IMAGE, 1 + sign * k / 10),
}


def test_there_are_fifteen_operations_with_ten_strengths():
    assert set(OPERATIONS) == set(EXPECTED)
    assert len(OPERATIONS) == 15
    assert {len(strengths) for _, strengths in OPERATIONS.values()} == {10}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [1, 4, 9])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_operation_equals_its_definition(name, magnitude, sign):
    got = np.asarray(apply_step(Image.fromarray(IMAGE), Step(name, magnitude, sign, CENTRE)))
    expected = EXPECTED[name](magnitude, sign)
    assert got.shape == IMAGE.shape
    assert got.dtype == np.uint8
    off = np.abs(got.astype(int) - expected)
    if name in {"shear_x", "shear_y", "rotate"}:
        # With fixed-point coordinates, a position on the edge of a pixel may be rounded to its neighbor.
        assert (off.max(axis=2) > 1).mean() < 0.01
    else:
        assert off.max() <= (1 if name in {"sharpness", "contrast", "color", "brightness", "autocontrast"} else 0)


def test_a_step_does_not_change_its_input():
    image = Image.fromarray(IMAGE)
    for name in OPERATIONS:
        apply_step(image, Step(name, 9, 1, CENTRE))
        np.testing.assert_array_equal(np.asarray(image), IMAGE)


@pytest.mark.parametrize("center", [(0.0, 0.0), (0.999, 0.999)])
def test_small_cutout_is_clipped_at_the_border(center):
    got = np.asarray(apply_step(Image.fromarray(IMAGE), Step("cutout", 9, 1, center)))
    x, y = (int(c * side) for c, side in zip(center, (WIDTH, HEIGHT), strict=True))
    np.testing.assert_array_equal(got, plain.cutout(IMAGE, 20, x, y))


def test_slots_operations_magnitudes_and_signs_are_uniform():
    rng = random.Random(0)
    number = 40_000
    policies = [draw_steps(rng) for _ in range(number)]
    slots = Counter(len(steps) for steps in policies)
    assert chisquare([slots[0], slots[1], slots[2]], [number / 4, number / 2, number / 4]).pvalue > 1e-3
    steps = [step for policy in policies for step in policy]
    pairs = Counter((step.operation, step.magnitude) for step in steps)
    assert set(pairs) == {(name, k) for name in OPERATIONS for k in range(1, 10)}
    assert chisquare(list(pairs.values())).pvalue > 1e-3
    assert chisquare(list(Counter(step.sign for step in steps).values())).pvalue > 1e-3
    both = Counter((a.operation, b.operation) for a, b in (p for p in policies if len(p) == 2))
    assert len(both) == 225
    assert chisquare(list(both.values())).pvalue > 1e-3
    centers = np.array([step.center for step in steps])
    assert ((centers >= 0) & (centers < 1)).all()
    for axis in centers.T:
        assert chisquare(np.histogram(axis, 20, (0, 1))[0]).pvalue > 1e-3
