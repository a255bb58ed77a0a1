"""cbsa-mini, a small real CLIP-style model, on real photographs: tokens and meaningful scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from cbsa_lightning.clip import FrozenCLIP

SPELLED_OUT = {"tvmonitor": "tv monitor", "diningtable": "dining table", "pottedplant": "potted plant"}


@pytest.fixture(scope="module")
def clip(realbench) -> FrozenCLIP:
    return FrozenCLIP.load(str(realbench / "cbsa-mini"))


@pytest.fixture(scope="module")
def voc(realbench) -> Path:
    return realbench / "voc2012-animals" / "VOCdevkit" / "VOC2012"


def center(path: Path, side: int = 224) -> torch.Tensor:
    """Resizes the shorter side to ``side`` and crops the center, as in open_clip's evaluation, in uint8."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    scale = side / min(rgb.size)
    rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    return torch.from_numpy(np.array(rgb.crop((left, top, left + side, top + side)))).permute(2, 0, 1)


def scores(clip: FrozenCLIP, voc: Path, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and labels (n, 20) of every ``step``-th validation image, for "a photo of a {name}"."""
    names = (voc / "ImageSets" / "Main" / "val.txt").read_text().split()[::step]
    lists = sorted((voc / "ImageSets" / "Main").glob("*_val.txt"))
    classes = [path.name.removesuffix("_val.txt") for path in lists]
    labels = [dict(line.split() for line in path.read_text().splitlines()) for path in lists]
    truth = np.array([[table[name] == "1" for table in labels] for name in names])
    text = clip.encode_texts([f"a photo of a {SPELLED_OUT.get(name, name)}" for name in classes])
    text = torch.nn.functional.normalize(text, dim=-1)
    cosines = []
    for start in range(0, len(names), 32):
        images = torch.stack([center(voc / "JPEGImages" / f"{n}.jpg") for n in names[start : start + 32]])
        g = clip.image_tokens(images).g
        cosines.append(torch.nn.functional.normalize(g, dim=-1) @ text.T)
    return torch.cat(cosines).numpy(), truth


def test_tokens_of_real_images(clip, voc, realbench):
    reference = open_clip.create_model(f"local-dir:{realbench / 'cbsa-mini'}", require_pretrained=True).eval()
    paths = sorted((voc / "JPEGImages").glob("*.jpg"))[:2]
    for side, grid in ((224, (7, 7)), (448, (14, 14))):
        images = torch.stack([center(path, side) for path in paths])
        with torch.no_grad():
            expected = reference.encode_image((images.float() / 255 - 0.5) / 0.5)
        tokens = clip.image_tokens(images)
        assert torch.equal(tokens.g, expected)
        assert tokens.grid == grid
        assert tokens.l.shape == (2, grid[0] * grid[1], 256)


def test_json_config_and_file_equal_the_folder(clip, realbench):
    folder = realbench / "cbsa-mini"
    same = FrozenCLIP.load(str(folder / "cbsa-mini.json"), str(folder / "cbsa-mini.safetensors"))
    assert same.fingerprint == clip.fingerprint
    assert clip.mean.flatten().tolist() == clip.std.flatten().tolist() == [0.5, 0.5, 0.5]


def test_the_best_text_is_often_correct(clip, voc):
    """The model's README states 0.451 on all 1,729 images; with shuffled classes it would be below 0.1."""
    cosines, truth = scores(clip, voc, step=30)
    assert truth[np.arange(len(truth)), cosines.argmax(1)].mean() > 0.35


@pytest.mark.slow
def test_zero_shot_map_equals_the_models_readme(clip, voc):
    cosines, truth = scores(clip, voc, step=1)
    seen = truth.sum(0) >= 5
    assert seen.sum() == 15
    per_class = [average_precision_score(truth[:, c], cosines[:, c]) for c in np.flatnonzero(seen)]
    assert np.mean(per_class) == pytest.approx(0.229, abs=0.002)
