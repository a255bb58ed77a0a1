"""Compares the text tower on prompt embeddings with open_clip's encode_text."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.clip.text import _Packing
from cbsa_lightning.errors import ConfigError
from tiny_clip import tiny_clip

TEXTS = ["a photo of a cat", "dog", "a fire hydrant beside the road in the rain"]
VARIANTS = {
    "CLIP": {},
    "CustomTextCLIP": {"custom_text": True},
    "eos": {"text_cfg": {"pool_type": "eos", "eos_id": 49407}},
    "quick-gelu": {"quick_gelu": True},
    "custom-eos-bias": {
        "custom_text": True,
        "text_cfg": {"pool_type": "eos", "eos_id": 49407, "proj_bias": True},
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    folder = tiny_clip(tmp_path_factory.mktemp("text"), "resnet", **VARIANTS[request.param])
    reference = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    # torch's attention selects its kernel by requires_grad, even if no gradient is computed.
    reference.requires_grad_(False)
    expected = open_clip.CustomTextCLIP if "ustom" in request.param else open_clip.CLIP
    assert type(reference) is expected
    return FrozenCLIP.load(str(folder)), reference


def test_equals_encode_text(pair):
    clip, reference = pair
    tokens = clip.tokenize(TEXTS)
    assert torch.equal(tokens, open_clip.tokenize(TEXTS))
    with torch.no_grad():
        expected = reference.encode_text(tokens)
    eot = clip.eot(tokens)
    assert torch.equal(eot, (tokens == 49407).nonzero()[:, 1])
    # The same operations in another order: equal up to rounding in float32 and in float64.
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        tower, plain = copy.deepcopy(clip).to(dtype), copy.deepcopy(reference).to(dtype)
        with torch.no_grad():
            assert_close_to_largest(
                tower.encode_prompts(tower.embed_tokens(tokens), eot), plain.encode_text(tokens), tolerance
            )
    torch.testing.assert_close(clip.encode_texts(TEXTS), expected, atol=1e-5, rtol=0)
    assert clip.embed_dim == expected.shape[1] == 24
    assert (clip.text_width, clip.context_length) == (16, 77)


def test_the_fast_form_equals_encode_text(pair):
    clip, reference = pair
    tokens = clip.tokenize(TEXTS)
    eot = clip.eot(tokens)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        tower, plain = copy.deepcopy(clip).to(dtype), copy.deepcopy(reference).to(dtype)
        tower.speed_up()
        embeddings = tower.embed_tokens(tokens)
        with torch.no_grad():
            expected = plain.encode_text(tokens)
            assert_close_to_largest(tower.encode_prompts(embeddings, eot), expected, tolerance)
            start, rest = embeddings[:1, :1], embeddings[:, 1:76]
            assert_close_to_largest(tower.encode_prompts(rest, eot - 1, start), expected, 5 * tolerance)


def test_padding_does_not_change_features_and_gradients(pair, monkeypatch):
    """Prompts are padded on devices other than a CPU."""
    clip = copy.deepcopy(pair[0]).double()
    generator = torch.manual_seed(0)
    prefix = torch.randn(2, 3, 16, generator=generator, dtype=torch.double).requires_grad_(True)
    rest = torch.randn(6, 5, 16, generator=generator, dtype=torch.double).requires_grad_(True)
    eot = torch.tensor([3, 1, 4, 0, 3, 1])
    direction = torch.randn(6, 24, generator=generator, dtype=torch.double)

    def encoded(start):
        features = clip.encode_prompts(rest, eot, start)
        leaves = (rest,) if start is None else (rest, start)
        return features, *torch.autograd.grad((features * direction).sum(), leaves)

    packed = [*encoded(prefix), *encoded(None)]
    assert _Packing.of(eot, 5).groups == [(1, 1), (2, 2), (2, 4), (1, 5)]
    padded = _Packing(torch.arange(6), eot, [(6, 5)])
    monkeypatch.setattr(_Packing, "of", lambda *_: padded)
    for one, other in zip(packed, [*encoded(prefix), *encoded(None)], strict=True):
        assert_close_to_largest(one, other, 1e-13)


def test_truncated_prompts_have_the_same_features_and_gradients(pair):
    clip = pair[0]
    tokens = clip.tokenize(TEXTS)
    eot = clip.eot(tokens)
    length = int(eot.max()) + 1
    assert length < 20
    direction = torch.randn(3, 24, generator=torch.manual_seed(0))
    # In float64 they are equal up to rounding, in float32 up to 1e-5 of the largest entry.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        tower = copy.deepcopy(clip).to(dtype)
        full = tower.embed_tokens(tokens).requires_grad_(True)
        cropped = full.detach()[:, :length].clone().requires_grad_(True)
        whole, part = tower.encode_prompts(full, eot), tower.encode_prompts(cropped, eot)
        assert_close_to_largest(part, whole, tolerance)
        (whole * direction.to(dtype)).sum().backward()
        (part * direction.to(dtype)).sum().backward()
        assert full.grad is not None
        assert cropped.grad is not None
        assert full.grad.abs().max() > 1e-3
        assert_close_to_largest(cropped.grad, full.grad[:, :length], tolerance)
        assert full.grad[:, length:].abs().max() == 0


def test_encoding_a_common_prefix_once_does_not_change_features_and_gradients(pair):
    clip = copy.deepcopy(pair[0]).double()
    generator = torch.manual_seed(0)
    prefix = torch.randn(2, 5, 16, generator=generator, dtype=torch.double).requires_grad_(True)
    rest = torch.randn(6, 4, 16, generator=generator, dtype=torch.double).requires_grad_(True)
    eot = torch.tensor([3, 1, 2, 0, 3, 2])
    whole = torch.cat([prefix.repeat_interleave(3, dim=0), rest], dim=1)
    direction = torch.randn(6, 24, generator=generator, dtype=torch.double)
    found = []
    for features in (clip.encode_prompts(rest, eot, prefix), clip.encode_prompts(whole, eot + 5)):
        found.append((features, *torch.autograd.grad((features * direction).sum(), (prefix, rest))))
    assert found[0][1].abs().max() > 1e-3
    for one, plain in zip(*found, strict=True):
        assert_close_to_largest(one, plain, 1e-12)
    with pytest.raises(ConfigError, match="78 tokens"):
        clip.encode_prompts(torch.zeros(1, 72, 16), torch.tensor([3]), torch.zeros(1, 6, 16))


def assert_close_to_largest(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance * float(expected.detach().abs().max()), rtol=0)


def test_one_call_for_many_prompts_equals_single_calls(pair):
    clip, _ = pair
    together = clip.encode_texts(TEXTS)
    alone = torch.cat([clip.encode_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_under_autocast(pair):
    clip, _ = pair
    tokens = clip.tokenize(TEXTS)
    embeddings = clip.embed_tokens(tokens)[:, :16].requires_grad_(True)
    full = clip.encode_prompts(embeddings, clip.eot(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        half = clip.encode_prompts(embeddings, clip.eot(tokens))
    half.float().square().mean().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert F.cosine_similarity(full, half.float()).min() > 0.99


def test_prompts_that_are_too_long_are_refused(pair):
    clip, _ = pair
    exactly = " ".join(["cat"] * 75)  # 75 + start and end
    assert clip.tokenize([exactly]).shape == (1, 77)
    with pytest.raises(ConfigError, match="77 tokens: 'cat cat") as raised:
        clip.tokenize(["dog", exactly + " cat"])
    assert "dog" not in str(raised.value)
    with pytest.raises(ConfigError, match="78 tokens"):
        clip.encode_prompts(torch.zeros(1, 78, 16), torch.tensor([3]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ({"no_causal_mask": True}, "not causal"),
        ({"embed_cls": True}, "not causal"),
        ({"pool_type": "last"}, "pooling 'last'"),
        ({"block_type": "custom"}, "blocks with the attention Attention"),
    ],
)
def test_unsupported_text_towers_are_refused(tmp_path, text, found):
    folder = tiny_clip(tmp_path, "resnet", custom_text=True, text_cfg=text)
    with pytest.raises(ConfigError, match=found):
        FrozenCLIP.load(str(folder))


def test_copies_share_the_tokenizer(pair):
    assert copy.deepcopy(pair[0]).tokenizer is pair[0].tokenizer
