"""Compares prompts with open_clip's token embeddings and encode_text."""

from __future__ import annotations

import open_clip
import pytest
import torch

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.networks.prompts import ClassPrompts, encode_prompt_sets

NAMES = ["dog", "fire hydrant", "potted plant in a corner"]


@pytest.fixture(scope="module")
def clip(clip_folder):
    return FrozenCLIP.load(str(clip_folder))


@pytest.fixture(scope="module")
def reference(clip_folder):
    return open_clip.create_model(f"local-dir:{clip_folder}", require_pretrained=True).eval()


def test_fixed_embeddings_equal_those_of_open_clip(clip, reference):
    prompts = ClassPrompts(clip, NAMES, length=5)
    embeddings, end = prompts()
    tokens = open_clip.tokenize([f"a a a a a {name}." for name in NAMES])
    expected = reference.token_embedding(tokens)[:, : embeddings.shape[1]]
    assert end.tolist() == tokens.argmax(1).tolist()
    assert embeddings.shape[1] == int(end.max()) + 1
    assert torch.equal(embeddings[:, :1], expected[:, :1])
    assert torch.equal(embeddings[:, 6:], expected[:, 6:])
    assert torch.equal(embeddings[:, 1:6], prompts.words)
    assert set(prompts.state_dict()) == {"words"}, "the checkpoint contains the embeddings of the class names"
    assert 0.01 < prompts.words.std() < 0.03


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("template", ["a photo of a", "itap of many"])  # both have four tokens
def test_features_of_a_template_equal_those_of_its_sentences(clip, reference, shared, template):
    prompts = ClassPrompts(clip, NAMES, length=16, shared=shared, template=template)
    assert prompts.words.shape == ((4, 16) if shared else (3, 4, 16))
    with torch.no_grad():
        (features,) = encode_prompt_sets(clip, [prompts])
        expected = reference.encode_text(open_clip.tokenize([f"{template} {name}." for name in NAMES]))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_shared_words_sum_the_gradients_of_all_classes(clip_folder):
    clip = FrozenCLIP.load(str(clip_folder)).double()  # because the gradients are summed in another order
    own = ClassPrompts(clip, NAMES, template="a photo of a").double()
    shared = ClassPrompts(clip, NAMES, shared=True, template="a photo of a").double()
    weights = torch.randn(3, 24, generator=torch.manual_seed(0), dtype=torch.float64)
    for prompts in (own, shared):
        (encode_prompt_sets(clip, [prompts])[0] * weights).sum().backward()
    assert own.words.grad.abs().amax((1, 2)).min() > 0
    torch.testing.assert_close(shared.words.grad, own.words.grad.sum(0), atol=1e-10, rtol=1e-8)
    assert all(p.grad is None for p in clip.parameters())


def test_each_class_has_separate_words(clip):
    prompts = ClassPrompts(clip, NAMES, length=2)
    features = encode_prompt_sets(clip, [prompts])[0]
    features[1].sum().backward()
    assert [float(g.abs().max()) > 0 for g in prompts.words.grad] == [False, True, False]


def test_two_sets_in_one_pass_equal_two_passes(clip):
    sets = [ClassPrompts(clip, NAMES, length=2), ClassPrompts(clip, NAMES, length=9)]
    with torch.no_grad():
        together = encode_prompt_sets(clip, sets)
        apart = [encode_prompt_sets(clip, [prompts])[0] for prompts in sets]
    assert not torch.allclose(apart[0], apart[1], atol=1e-3)
    for ours, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("words", [59, 100])
def test_a_class_name_that_is_too_long_is_named(clip, words):
    long = "dog " * (words - 1) + "zebra"
    with pytest.raises(ConfigError, match="zebra"):
        ClassPrompts(clip, ["cat", long])


def test_the_longest_class_name_that_fits(clip, reference):
    name = "dog " * 57 + "zebra"  # 58 tokens: start, 16 words, name, full stop, end are 77
    prompts = ClassPrompts(clip, ["cat", name])
    assert prompts.end.tolist() == [18 + 1, 76]


def test_fixed_words(clip):
    with pytest.raises(ConfigError, match="template"):
        ClassPrompts(clip, NAMES, trainable=False)
    with pytest.raises(ConfigError, match="got 0"):
        ClassPrompts(clip, NAMES, length=0)
    assert not ClassPrompts(clip, NAMES, template="a photo of a", trainable=False).words.requires_grad


def test_all_kinds_of_sets_can_be_combined(clip):
    torch.manual_seed(0)
    kinds = [
        ClassPrompts(clip, NAMES, length=3, shared=True),
        ClassPrompts(clip, NAMES, length=3, shared=True),
        ClassPrompts(clip, NAMES, length=5),
        ClassPrompts(clip, NAMES, template="a photo of a", trainable=False),
    ]
    plain = [clip.encode_prompts(*prompts()) for prompts in kinds]
    for members in ([0, 1], [2, 3], [0, 2], [3, 1, 0, 2]):
        found = encode_prompt_sets(clip, [kinds[i] for i in members])
        for i, features in zip(members, found, strict=True):
            torch.testing.assert_close(features, plain[i], atol=1e-5, rtol=0)
    assert (plain[0] - plain[1]).abs().max() > 1e-3
