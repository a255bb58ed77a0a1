"""Compares value-path tokens and tokens without positions with loops over open_clip's own layers."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch

from cbsa_lightning.clip import FrozenCLIP
from reference.regions import assert_near, attended, resnet_weights, timm_weights, values
from tiny_clip import VISION, tiny_clip

# The native grid and another one. timm resizes absolute positions differently from CLIP.
GRIDS = {"resnet": [(2, 2), (3, 4)], "timm": [(5, 5)], "rot": [(5, 5), (2, 3)]}


@pytest.fixture(scope="module", params=["resnet", "timm", "rot", "vit"])
def pair(request, tmp_path_factory):
    folder = tiny_clip(tmp_path_factory.mktemp(request.param) / "clip", request.param)
    reference = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    return request.param, FrozenCLIP.load(str(folder)), reference.requires_grad_(False)


def weights_of(kind, reference):
    return resnet_weights(reference.visual.attnpool) if kind == "resnet" else timm_weights(reference.visual.head)


def random_maps(grid, seed=0):
    return torch.randn(2, 256, *grid, generator=torch.manual_seed(seed))


def pictures(kind):
    size = VISION[kind]["image_size"]
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.mark.parametrize("positions", [True, False])
def test_values_equal_loops(pair, positions):
    kind, clip, reference = pair
    for grid in GRIDS.get(kind, []):
        maps = random_maps(grid)
        with torch.no_grad():
            tokens = clip.pool.values(maps, positions=positions)
        expected = torch.stack([torch.stack(values(m, weights_of(kind, reference), positions)) for m in maps.double()])
        assert tokens.grid == grid
        assert tokens.l.shape == (2, grid[0] * grid[1], 24)
        assert_near(tokens.l, expected[:, 1:], 1e-5)
        assert_near(tokens.g, expected[:, 0], 1e-5)
    if kind == "vit":
        features = clip.features(pictures(kind))
        plain, tokens = clip.pool(features), clip.pool.values(features, positions=positions)
        assert torch.equal(tokens.g, plain.g)
        assert torch.equal(tokens.l, plain.l)
        assert tokens.grid == plain.grid == (4, 4)


@pytest.mark.parametrize("pair", ["resnet", "timm", "rot"], indirect=True)  # a ViT mixes tokens earlier
def test_a_token_depends_only_on_its_own_place(pair):
    """Changing one place changes only its token and the mean token, unlike after attention."""
    kind, clip, _ = pair
    maps = random_maps((5, 5) if kind == "timm" else (2, 2))
    other = maps.clone()
    other[:, :, 0, 1] += 1
    for mixes, pool in ((False, clip.pool.values), (True, clip.pool)):
        changed = [(a - b).abs().amax((0, -1)) > 1e-6 for a, b in zip(pool(maps)[:2], pool(other)[:2], strict=True)]
        assert changed[0]
        expected = torch.full_like(changed[1], mixes)
        expected[1] = True
        assert torch.equal(changed[1], expected)


@pytest.mark.parametrize("pair", ["timm", "rot"], indirect=True)
def test_timm_pool_with_separate_projections(pair):
    _, clip, _ = pair
    maps, pool = random_maps((5, 5)), copy.deepcopy(clip.pool)
    parts = zip("qkv", pool.attention.qkv.weight.chunk(3), pool.attention.qkv.bias.chunk(3), strict=True)
    for name, weight, bias in parts:
        layer = torch.nn.Linear(256, 256)
        layer.load_state_dict({"weight": weight, "bias": bias})
        setattr(pool.attention, name, layer)
    pool.attention.qkv = None
    torch.testing.assert_close(pool.values(maps).l, clip.pool.values(maps).l, atol=1e-5, rtol=0)


def test_values_include_positions_by_default(pair):
    kind, clip, _ = pair
    features = clip.features(pictures(kind))
    default, without = clip.pool.values(features), clip.pool.values(features, positions=False)
    assert torch.equal(default.l, clip.pool.values(features, positions=True).l)
    assert torch.equal(default.l, without.l) == (kind in ("rot", "vit"))
    if kind != "vit":  # the projection of the mean is the mean of the projections, unless the mean has its own position
        torch.testing.assert_close(without.g, without.l.mean(1), atol=1e-5, rtol=0)


def test_forward_with_and_without_positions(pair):
    kind, clip, reference = pair
    images = pictures(kind)
    features = clip.features(images)
    tokens, asked = clip.pool(features), clip.pool(features, positions=True)
    with torch.no_grad():
        assert torch.equal(tokens.g, reference.encode_image((images.float() / 255 - clip.mean) / clip.std))
    assert torch.equal(tokens.g, asked.g)
    assert torch.equal(tokens.l, asked.l)
    without = clip.pool(features, positions=False)
    assert torch.equal(without.l, tokens.l) == (kind == "vit")
    for grid in GRIDS.get(kind, []):
        maps = random_maps(grid, seed=2) * 3  # large enough for an attention that is far from uniform
        with torch.no_grad():
            without = clip.pool(maps, positions=False)
        expected = torch.stack([torch.stack(attended(m, weights_of(kind, reference), False)) for m in maps.double()])
        assert_near(without.g, expected[:, 0], 1e-5)
        assert_near(without.l, expected[:, 1:], 1e-5)


def test_half_precision_features_and_gradients(pair):
    kind, clip, _ = pair
    features = clip.features(pictures(kind))
    half = clip.pool.values(features.half())
    assert half.g.dtype == half.l.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half.l, clip.pool.values(features).l, dim=-1).min() > 0.999
    leaf = features.clone().requires_grad_(True)
    clip.pool.values(leaf, positions=False).l.square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0
