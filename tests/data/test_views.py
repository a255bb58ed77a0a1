from __future__ import annotations

import os
import pickle
import subprocess
import sys
from itertools import product

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torch.utils.data import DataLoader, Dataset

from cbsa_lightning.data.augmentations import Albumentations, CutoutRandAugment
from cbsa_lightning.data.samplers import Draw, LabeledBatches
from cbsa_lightning.data.views import PlainView, StrongView, WeakView, squash
from cbsa_lightning.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("error")

IMAGE = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
SIZE = 48


def hwc(view):
    return view.permute(1, 2, 0).numpy()


def test_plain_view_equals_pillows_bilinear_resize():
    for shape in [(75, 100), (48, 48), (20, 30), (1, 1), (7, 300), (300, 40)]:
        image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
        view = PlainView(SIZE)(image)
        expected = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        assert view.dtype == torch.uint8
        assert view.shape == (3, SIZE, SIZE)
        assert view.is_contiguous()
        assert np.abs(hwc(view).astype(int) - expected).max() <= 1
    assert (PlainView(SIZE)(IMAGE) == PlainView(SIZE)(IMAGE, Draw(4, 5, 6))).all()


def test_a_resized_image_is_unchanged():
    for size in (1, 2, 17, SIZE):
        small = np.random.default_rng(2).integers(0, 256, (size, size, 3), dtype=np.uint8)
        assert squash(small, size) is small
        for image in (small, small[::-1], small[:, ::-1], small[..., ::-1], small.transpose(1, 0, 2)):
            np.testing.assert_array_equal(hwc(PlainView(size)(image)), image)


@pytest.mark.parametrize("view", [WeakView(SIZE, 3), StrongView(SIZE, 3), PlainView(SIZE)])
def test_views_of_a_resized_image_equal_those_of_its_file(view):
    small = squash(IMAGE, SIZE)
    for draw in (Draw(index, epoch, 0) for index in range(20) for epoch in range(2)):
        assert torch.equal(view(small, draw), view(IMAGE, draw))


@pytest.mark.parametrize("view", [WeakView(SIZE, 0), StrongView(SIZE, 0), PlainView(SIZE)])
def test_views_share_no_memory_and_accept_read_only_images(view):
    for image in (IMAGE.copy(), IMAGE[:SIZE, :SIZE].copy()):
        kept = image.copy()
        image.flags.writeable = False
        for epoch in range(8):
            result = view(image, Draw(0, epoch, 0))
            assert result.shape == (3, SIZE, SIZE)
            assert result.dtype == torch.uint8
            assert result.is_contiguous()
            result.zero_()
        np.testing.assert_array_equal(image, kept)


def test_weak_view_is_the_plain_view_or_its_mirror_image():
    weak = WeakView(SIZE, seed=3)
    upright = PlainView(SIZE)(IMAGE)
    mirrored = upright.flip(-1)
    flips = []
    for index, epoch, visit in product(range(40), range(5), range(2)):
        draw = Draw(index, epoch, visit)
        view = weak(IMAGE, draw)
        flips.append(torch.equal(view, mirrored))
        assert flips[-1] or torch.equal(view, upright)
        assert weak.flips(draw) is flips[-1]
    flips = np.array(flips, float).reshape(40, 5, 2)
    assert abs(flips.mean() - 0.5) < 3 * 0.5 / np.sqrt(flips.size)
    for one, other in [
        (flips[1:], flips[:-1]),
        (flips[:, 1:], flips[:, :-1]),
        (flips[..., 1], flips[..., 0]),
    ]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.25  # index, epoch and visit all change the view


def test_strong_view_differs_for_each_seed_epoch_visit_and_index():
    draws = [Draw(*key) for key in product(range(5), range(4), range(3))]
    views = {seed: StrongView(SIZE, seed) for seed in (0, 1)}
    made = {(seed, draw): views[seed](IMAGE, draw).numpy().tobytes() for seed in views for draw in draws}
    assert len(set(made.values())) == 2 * len(draws)
    again = StrongView(SIZE, 0)
    for draw in reversed(draws):  # independent of earlier calls
        assert again(IMAGE, draw).numpy().tobytes() == made[0, draw]


def steps_of(view):
    return view._pipeline.transforms[-1].params["steps"]


def test_weak_and_strong_flips_of_one_draw_are_independent():
    weak, strong = WeakView(SIZE, 0), StrongView(SIZE, 0, CutoutRandAugment(0))
    upright = PlainView(SIZE)(IMAGE)
    pairs = []
    for index in range(1200):
        view = strong(IMAGE, Draw(index, 0, 0))
        if not steps_of(strong):  # one in four is a weak view
            pairs.append((torch.equal(weak(IMAGE, Draw(index, 0, 0)), upright), torch.equal(view, upright)))
    assert abs(len(pairs) / 1200 - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 1200)
    assert abs(np.corrcoef(np.array(pairs, float).T)[0, 1]) < 0.2


def cutouts(number, size, cutout=0.5):
    """Returns boxes (top, bottom, left, right; ends exclusive), colors and flips of cutouts on a white image."""
    view = StrongView(size, 0, CutoutRandAugment(cutout))
    white = np.full((size, size, 3), 255, np.uint8)
    flip, cut, augment = view._pipeline.transforms
    augment.p = 0  # only the cutout
    for index in range(number):
        picture = hwc(view(white, Draw(index, 0, 0)))
        painted = (picture != 255).any(axis=2)
        rows, columns = painted.any(axis=1).nonzero()[0], painted.any(axis=0).nonzero()[0]
        box = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        patch = picture[box[0] : box[1], box[2] : box[3]].reshape(-1, 3)
        assert len(patch) == painted.sum()  # one full rectangle ...
        assert (patch == patch[0]).all()  # ... in one color
        assert cut.params["color"] == tuple(patch[0])
        yield box, patch[0], bool(flip.params)


def test_cutout_has_the_sides_area_place_and_colors_of_the_fact_sheet():
    number, size, half = 1000, 64, 16  # int(0.5 * 64 + 0.5) // 2
    boxes, colors, flips = (np.array(part) for part in zip(*cutouts(number, size), strict=True))
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    # With the center uniform over 0 ... 63 and both ends painted:
    lengths = [min(size - 1, center + half) - max(0, center - half) + 1 for center in range(size)]
    for sides in (heights, widths):
        assert (sides.min(), sides.max()) == (min(lengths), max(lengths)) == (17, 33)
    area = np.mean(lengths) ** 2
    assert area / size**2 < 0.25
    assert abs((heights * widths).mean() - area) < 4 * (heights * widths).std() / np.sqrt(number)
    for start, end in ((boxes[:, 0], boxes[:, 1]), (boxes[:, 2], boxes[:, 3])):
        # The 17 centers next to a border are clipped there; all other centers are equally frequent.
        assert abs((start == 0).mean() - 17 / 64) < 0.06
        assert abs((end == size).mean() - 17 / 64) < 0.06
        inner = (start + half)[(start > 0) & (end < size)]
        assert chisquare(np.bincount(inner)[half + 1 : size - half - 1]).pvalue > 1e-3
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.13
    assert (np.abs(colors.mean(axis=0) - 127.5) < 4 * 74 / np.sqrt(number)).all()
    assert np.abs(np.corrcoef(colors.T) - np.eye(3)).max() < 0.13
    # One stream for all transforms: the position of the rectangle must not depend on the flip.
    centers = boxes[:, ::2].mean(axis=1)
    assert abs(centers[flips].mean() - centers[~flips].mean()) < 4 * centers.std() * 2 / np.sqrt(number)
    assert abs(flips.mean() - 0.5) < 0.06


@pytest.mark.parametrize(("size", "cutout", "side"), [(224, 0.5, 113), (32, 0.5, 17), (33, 0.5, 17), (64, 0.25, 17)])
def test_whole_cutout_side(size, cutout, side):
    assert max(box[1] - box[0] for box, _, _ in cutouts(60, size, cutout)) == side


def test_without_cutout_a_quarter_of_strong_views_are_weak():
    strong = StrongView(SIZE, 5, CutoutRandAugment(0))
    weak = [PlainView(SIZE)(IMAGE), PlainView(SIZE)(IMAGE).flip(-1)]
    counts = [0, 0, 0]
    for index in range(800):
        view = strong(IMAGE, Draw(index, 0, 0))
        counts[len(steps_of(strong))] += 1
        if not steps_of(strong):
            assert any(torch.equal(view, one) for one in weak)
    assert np.abs(np.array(counts) / 800 - [0.25, 0.5, 0.25]).max() < 0.06


class _Views(Dataset):
    def __init__(self):
        self.views = WeakView(SIZE, 7), StrongView(SIZE, 7)

    def __getitem__(self, draw):
        return (torch.tensor(draw), *(view(IMAGE, draw) for view in self.views))


def test_views_do_not_depend_on_the_number_of_workers():
    # This fails with albumentations' own streams, which repeat in every worker.
    batches = LabeledBatches(range(12), 3, seed=0, num_batches=8)
    seen = set()
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        alone, shared = (list(DataLoader(_Views(), batch_sampler=batches, num_workers=w)) for w in (0, 2))
        assert len(alone) == len(shared) == 8
        for one, other in zip(alone, shared, strict=True):
            for left, right in zip(one, other, strict=True):
                assert torch.equal(left, right)
        seen |= {view.numpy().tobytes() for _, _, strong in shared for view in strong}
    assert len(seen) == 2 * 8 * 3


def test_views_can_be_pickled_for_spawned_workers():
    for view in (WeakView(SIZE, 1), StrongView(SIZE, 1), PlainView(SIZE)):
        copy = pickle.loads(pickle.dumps(view))
        assert torch.equal(copy(IMAGE, Draw(1, 2, 3)), view(IMAGE, Draw(1, 2, 3)))


@pytest.mark.slow  # imports torch and albumentations in a new process
def test_importing_views_uses_no_network_and_no_opencv_threads():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import cbsa_lightning.data.views, cv2, os\n"
        "print(os.environ['NO_ALBUMENTATIONS_UPDATE'], cv2.getNumThreads())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeakView(0, 1), "size of a view is 0"),
        (lambda: PlainView(-3), "size of a view is -3"),
        (lambda: StrongView(8, -1), "seed is -1"),
        (lambda: CutoutRandAugment(1.5), "cutout must be .* got 1.5"),
        (lambda: CutoutRandAugment(-0.1), "cutout must be .* got -0.1"),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("image", [IMAGE[..., 0], IMAGE.astype(np.float32), IMAGE.transpose(2, 0, 1)])
def test_invalid_arrays_are_refused(image):
    for view in (WeakView(8, 0), StrongView(8, 0), PlainView(8)):
        with pytest.raises(DataError, match="found"):
            view(image, Draw(0, 0, 0))


def test_any_albumentations_transforms_make_a_view():
    flipped = StrongView(SIZE, 0, Albumentations([A.HorizontalFlip(p=1)]))(IMAGE, Draw(0, 0, 0))
    assert torch.equal(flipped, PlainView(SIZE)(IMAGE).flip(-1))
    noisy = StrongView(SIZE, 0, Albumentations([A.GaussNoise(p=1)]))
    assert torch.equal(noisy(IMAGE, Draw(0, 1, 0)), noisy(IMAGE, Draw(0, 1, 0)))
    assert not torch.equal(noisy(IMAGE, Draw(0, 1, 0)), noisy(IMAGE, Draw(0, 2, 0)))


def test_augmentations_with_different_settings_have_different_names():
    names = [Albumentations([A.ColorJitter(p=p)]).name for p in (0.5, 0.8)]
    assert names[0] != names[1]
    assert CutoutRandAugment(0.5).name != CutoutRandAugment(0.25).name


def test_transforms_that_change_the_size_are_refused():
    view = StrongView(SIZE, 0, Albumentations([A.Resize(8, 8)]))
    with pytest.raises(ConfigError, match=r"returns uint8 \(8, 8, 3\)"):
        view(IMAGE, Draw(0, 0, 0))
    with pytest.raises(ConfigError, match="transforms cannot be a str"):
        Albumentations(["HorizontalFlip"])
