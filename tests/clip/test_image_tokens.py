"""Dense image tokens (Eq. 3) against open_clip, per kind of tower."""

from __future__ import annotations

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbsa_lightning.clip import FrozenCLIP, ImageTokens
from cbsa_lightning.clip.pooling import resize_positions
from cbsa_lightning.errors import ConfigError, DataError
from tiny_clip import MEAN, STD, VISION, tiny_clip

KINDS = ("resnet", "timm", "rot", "vit")
GRID = {"resnet": 2, "timm": 5, "rot": 5, "vit": 4}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tiny_clip(tmp_path_factory.mktemp(request.param) / "clip", request.param)
    reference = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    return request.param, FrozenCLIP.load(str(folder)), reference


def pictures(kind, count=3, factor=1):
    size = VISION[kind]["image_size"] * factor
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(1))


def normalized(images):
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_global_token_is_bit_identical_to_encode_image(pair):
    kind, clip, reference = pair
    images = pictures(kind)
    with torch.no_grad():
        expected = reference.encode_image(normalized(images))
    tokens = clip.image_tokens(images)
    assert isinstance(tokens, ImageTokens)
    assert torch.equal(tokens.g, expected)
    assert tokens.g.std() > 1e-3
    assert tokens.grid == (GRID[kind], GRID[kind])
    assert tokens.l.shape == (3, GRID[kind] ** 2, 24)
    assert torch.equal(clip.image_tokens(images.float() / 255).g, expected)


def test_local_tokens_are_all_outputs_of_the_attention(pair):
    """Compares with independent results: numpy attention for the pools, open_clip's own tokens for the ViT."""
    kind, clip, reference = pair
    images = pictures(kind)
    with torch.no_grad():
        if kind == "vit":
            visual = copy.deepcopy(reference.visual)
            visual.output_tokens = True
            expected = (visual(normalized(images))[1] @ visual.proj).numpy()
        elif kind == "resnet":
            maps = reference.visual.forward_intermediates(normalized(images))["image_intermediates"][-1]
            expected = resnet_attention(reference.visual.attnpool, maps)[:, 1:]
        else:  # timm's pool can return the spatial tokens itself, but not together with token 0
            head = copy.deepcopy(reference.visual.head)
            head.pool.pool_type = ""
            spatial = head.pool(reference.visual.trunk(normalized(images))).flatten(2).transpose(1, 2)
            expected = head[1:](spatial).numpy()
    np.testing.assert_allclose(clip.image_tokens(images).l.numpy(), expected, atol=2e-6)


def resnet_attention(pool, maps):
    """Multi-head self-attention over [mean, grid tokens], head by head, in numpy float64."""
    x = maps.double().flatten(2).transpose(1, 2).numpy()
    x = np.concatenate([x.mean(1, keepdims=True), x], 1) + pool.positional_embedding.double().numpy()

    def linear(layer, value):
        return value @ layer.weight.double().numpy().T + layer.bias.double().numpy()

    q, k, v = linear(pool.q_proj, x), linear(pool.k_proj, x), linear(pool.v_proj, x)
    out = np.empty_like(v)
    width = x.shape[-1] // pool.num_heads
    for b in range(len(x)):
        for h in range(pool.num_heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[b][:, part] @ k[b][:, part].T / np.sqrt(width)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[b][:, part] = weights / weights.sum(1, keepdims=True) @ v[b][:, part]
    return linear(pool.c_proj, out)


def test_images_of_twice_the_native_size(pair):
    """Positions are resized. If open_clip does so too (timm, ViT), g still equals its embedding."""
    kind, clip, reference = pair
    images = pictures(kind, factor=2)
    tokens = clip.image_tokens(images)
    assert tokens.grid == (2 * GRID[kind], 2 * GRID[kind])
    with torch.no_grad():
        if kind == "vit":
            visual, native = copy.deepcopy(reference.visual), reference.visual.positional_embedding
            resized = F.interpolate(native[1:].T.reshape(1, -1, 4, 4), size=(8, 8), mode="bicubic", antialias=True)
            rows = torch.cat([native[:1], resized[0].flatten(1).T])
            visual.positional_embedding = nn.Parameter(rows)
            expected = visual(normalized(images))
        elif kind == "resnet":
            visual, native = copy.deepcopy(reference.visual), reference.visual.attnpool.positional_embedding
            resized = F.interpolate(native[1:].T.reshape(1, -1, 2, 2), size=(4, 4), mode="bicubic")
            rows = torch.cat([native[:1], resized[0].flatten(1).T])
            visual.attnpool.positional_embedding = nn.Parameter(rows)
            expected = visual(normalized(images))
        else:
            expected = reference.encode_image(normalized(images))
    assert torch.equal(tokens.g, expected)


def test_resized_positions_keep_the_class_row_and_carry_gradients():
    positions = torch.randn(1 + 9, 4, requires_grad=True)
    assert resize_positions(positions, (3, 3), (3, 3), False) is positions
    larger = resize_positions(positions, (3, 3), (6, 4), False)
    assert larger.shape == (1 + 24, 4)
    assert torch.equal(larger[0], positions[0])
    larger.sum().backward()
    # Bicubic weights of one output sum to 1, so the gradients of all grid rows sum to the 24 outputs.
    assert positions.grad is not None
    torch.testing.assert_close(positions.grad[1:].sum(0), torch.full((4,), 24.0))
    torch.testing.assert_close(positions.grad[0], torch.ones(4))


def test_frozen_in_every_mode(pair):
    kind, clip, _ = pair
    before = copy.deepcopy(clip.state_dict())
    assert clip.train() is clip
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    clip.image_tokens(pictures(kind))
    after = clip.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    if kind != "vit":
        assert any("running_mean" in key for key in after)
    assert {key.split(".")[0] for key in after} == {"mean", "std", "tower", "pool", "text"}
    tensors = [value.untyped_storage().data_ptr() for value in after.values()]
    assert len(tensors) == len(set(tensors)), "a weight has two keys"


def test_only_the_pool_gets_gradients_and_the_fingerprint_is_unchanged(pair):
    kind, clip, _ = pair
    clip, fingerprint = copy.deepcopy(clip), pair[1].fingerprint
    clip.pool.requires_grad_(True)
    clip.train()
    features = clip.features(pictures(kind))
    assert not features.requires_grad
    tokens = clip.pool(features)
    (tokens.g.square().mean() + tokens.l.square().mean()).backward()
    pool = dict(clip.pool.named_parameters())
    assert len(pool) >= 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.values())
    assert any(p.grad.abs().max() > 0 for p in pool.values())
    assert all(p.grad is None for name, p in clip.named_parameters() if not name.startswith("pool."))
    with torch.no_grad():
        next(iter(pool.values())).add_(1.0)
    assert clip.fingerprint == fingerprint


@pytest.mark.parametrize("factor", [1, 2])
def test_under_autocast_and_with_half_precision_features(pair, factor):
    kind, clip, _ = pair
    clip = copy.deepcopy(clip)
    clip.pool.requires_grad_(True)
    images = pictures(kind, factor=factor)
    full = clip.image_tokens(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = clip.image_tokens(images)
        loss = half.g.float().square().mean() + half.l.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.pool.parameters())
    for a, b in ((full.g, half.g), (full.l, half.l)):
        assert F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.99
    stored = clip.pool(clip.features(images).half())
    assert stored.g.dtype == torch.float32
    assert F.cosine_similarity(full.l.flatten(), stored.l.flatten(), dim=0) > 0.999


def test_copy_and_state_dict_round_trip(pair, tmp_path):
    kind, clip, _ = pair
    images = pictures(kind)
    twin = copy.deepcopy(clip)
    assert torch.equal(twin.image_tokens(images).g, clip.image_tokens(images).g)
    assert twin.pool is not clip.pool
    other = FrozenCLIP.load(str(tiny_clip(tmp_path / "other", kind, seed=7)))
    assert other.fingerprint != clip.fingerprint
    assert not torch.equal(other.image_tokens(images).g, clip.image_tokens(images).g)
    other.load_state_dict(clip.state_dict())
    assert torch.equal(other.image_tokens(images).g, clip.image_tokens(images).g)


def test_refuses_wrong_images(pair):
    kind, clip, _ = pair
    with pytest.raises(DataError, match=r"\(3, 64, 64\)"):
        clip.features(torch.zeros(3, 64, 64))
    with pytest.raises(DataError, match=r"torch\.int64"):
        clip.features(torch.zeros(1, 3, 64, 64, dtype=torch.int64))
    if kind == "vit":
        with pytest.raises(ConfigError, match="4 x 8 patches"):
            clip.features(torch.zeros(1, 3, 64, 128))
    elif kind == "resnet":
        assert clip.image_tokens(torch.zeros(1, 3, 64, 128)).grid == (2, 4)


@pytest.mark.parametrize(
    ("kind", "vision", "found"),
    [
        ("timm", {"timm_pool": "avg", "timm_proj": "linear"}, "pool of its own"),
        ("vit", {"pool_type": "avg"}, "pool_type 'avg'"),
        ("vit", {"attentional_pool": True}, "AttentionalPooler"),
    ],
)
def test_towers_without_joint_space_tokens_are_refused(tmp_path, kind, vision, found):
    folder = tiny_clip(tmp_path, kind, vision_cfg=vision)
    with pytest.raises(ConfigError, match=found) as raised:
        FrozenCLIP.load(str(folder))
    assert "abs_attn" in str(raised.value)


def test_timm_pool_with_separate_projections(tmp_path):
    """open_clip builds a fused layer; a pool with the same weights in three layers returns the same tokens."""
    from timm.layers import AttentionPool2d

    clip = FrozenCLIP.load(str(tiny_clip(tmp_path, "timm")))
    fused = clip.pool.attention
    separate = AttentionPool2d(256, feat_size=5, out_features=24, qkv_separate=True)
    parts = {
        f"{n}.{t}": c for t in ("weight", "bias") for n, c in zip("qkv", getattr(fused.qkv, t).chunk(3), strict=True)
    }
    shared = {key: value for key, value in fused.state_dict().items() if not key.startswith("qkv")}
    separate.load_state_dict({**parts, **shared})
    images = pictures("timm")
    expected = clip.image_tokens(images)
    clip.pool.attention = separate
    tokens = clip.image_tokens(images)
    torch.testing.assert_close(tokens.g, expected.g, atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.l, expected.l, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_towers_return_the_same_features(pair, dtype):
    kind, clip, _ = pair
    plain, fast = copy.deepcopy(clip).to(dtype), copy.deepcopy(clip).to(dtype)
    fast.speed_up()
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.tower.modules()) == (kind != "vit")
    if kind != "vit":
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.tower.modules())
    images = pictures(kind, count=2)
    expected, found = plain.features(images), fast.features(images)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast.fingerprint == clip.fingerprint


def test_folded_quick_gelu_of_a_vit_returns_the_same_features(tmp_path):
    clip = FrozenCLIP.load(str(tiny_clip(tmp_path, "vit", quick_gelu=True))).double()
    expected = clip.features(pictures("vit", count=2))
    activations = {type(m).__name__ for m in clip.tower.modules()}
    clip.speed_up()
    assert "QuickGELU" in activations - {type(m).__name__ for m in clip.tower.modules()}
    found = clip.features(pictures("vit", count=2))
    torch.testing.assert_close(found, expected, atol=1e-13 * float(expected.abs().max()), rtol=0)
