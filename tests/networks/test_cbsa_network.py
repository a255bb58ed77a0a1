"""The paper's network: Eq. 5 compared with loops, gradients of each loss, and optional parts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from cbsa_lightning.method.losses import context_loss
from cbsa_lightning.networks.cbsa import CBSANetwork
from reference.decoder import weights_of
from reference.network import logits as slow_logits
from tiny_clip import tiny_clip

NAMES = ["dog", "fire hydrant", "cat"]


def build(clip_folder, alignment=True, **settings):
    torch.manual_seed(0)
    small = {"prompt_length": 2, "decoder_heads": 4, "decoder_feedforward": 16, "num_contexts": 0}
    return CBSANetwork(NAMES, str(clip_folder), semantic_alignment=alignment, **{**small, **settings}).eval()


def pictures(count=2):
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.mark.parametrize("alignment", [True, False])
def test_scores_and_maps_equal_loops(clip_folder, alignment):
    network = build(clip_folder, alignment, num_contexts=2, scale=7.0)
    with torch.no_grad():
        features, text = network.features(pictures()), network.encode_text()
        output = network(features, text, attention=True)
        tokens = network.clip.pool(features)
        g, local = tokens.g.double().numpy(), tokens.l.double().numpy()
        places = network.clip.pool.values(features).l.double().numpy()
        target = text.target.double().numpy()
        semantic = text.semantic.double().numpy() if alignment else None
    blocks = [weights_of(block) for block in network.decoder.blocks] if alignment else None
    expected, maps = slow_logits(7.0, g, local, places, target, semantic, blocks, 4)
    np.testing.assert_allclose(output.logits.numpy(), expected, atol=1e-4)
    if alignment:
        assert output.attention.shape == (2, 3, *tokens.grid)
        np.testing.assert_allclose(output.attention.flatten(2).numpy(), maps, atol=1e-5)
        np.testing.assert_allclose(output.attention.sum((2, 3)).numpy(), 1, atol=1e-5)
    else:
        assert output.attention is None
        assert text.semantic is None
    head = network.context_head
    by_hand = g @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    np.testing.assert_allclose(output.context_logits.numpy(), by_hand, atol=1e-5)
    torch.testing.assert_close(network(features).logits, output.logits)
    assert network(features).attention is None


def test_text_features_of_both_prompts(clip_folder):
    network = build(clip_folder, prompt_template="a photo of a")
    expected = network.clip.encode_texts([f"a photo of a {name}." for name in NAMES])
    text = network.encode_text()
    torch.testing.assert_close(text.target, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.semantic, expected, atol=1e-5, rtol=0)
    assert network.target_prompts.words is not network.semantic_prompts.words


def test_the_context_loss_trains_weights_shared_with_the_label_task(clip_folder):
    network = build(clip_folder, num_contexts=2)
    features = network.features(pictures())
    context_loss(network(features).context_logits, torch.tensor([0, 1])).sum().backward()
    touched = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    learned_from_contexts = {name for name in touched if not name.startswith("context_head.")}
    assert learned_from_contexts
    assert all(name.startswith("clip.pool.") for name in learned_from_contexts)

    network.zero_grad(set_to_none=True)
    network(features).logits.square().sum().backward()
    from_labels = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learned_from_contexts <= from_labels, "the label task does not use weights trained by the context loss"
    assert any(name.startswith("decoder.") for name in from_labels)
    assert {"target_prompts.words", "semantic_prompts.words", "log_scale"} <= from_labels
    assert not any(name.startswith(("clip.tower.", "clip.text.")) for name in touched | from_labels)


def test_a_frozen_pool_with_contexts_is_reported(clip_folder):
    with pytest.warns(UserWarning, match="attention pool is frozen"):
        network = build(clip_folder, num_contexts=2, train_pool=False)
    context_loss(network(network.features(pictures())).context_logits, torch.tensor([0, 1])).sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        "context_head.weight",
        "context_head.bias",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(clip_folder, num_contexts=0, train_pool=False)
        build(clip_folder, num_contexts=2)


def test_variants_of_table_3(clip_folder):
    fixed = build(clip_folder, target_prompts=False)
    assert not fixed.target_prompts.words.requires_grad
    assert fixed.semantic_prompts.words.requires_grad
    expected = fixed.clip.encode_texts([f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(fixed.encode_text().target, expected, atol=1e-5, rtol=0)

    without = build(clip_folder, alignment=False)
    assert without.semantic_prompts is None
    assert without(without.features(pictures())).context_logits is None
    assert without.num_contexts == 0


def test_contexts_do_not_change_the_initial_values_of_other_weights(clip_folder):
    plain, with_contexts = build(clip_folder), build(clip_folder, num_contexts=3)
    theirs = with_contexts.state_dict()
    assert set(theirs) - set(plain.state_dict()) == {"context_head.weight", "context_head.bias"}
    assert all(torch.equal(value, theirs[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("train_pool", [True, False])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_groups_contain_each_trainable_weight_once(clip_folder, train_pool, learn_scale):
    network = build(clip_folder, train_pool=train_pool, learn_scale=learn_scale, pool_lr_scale=0.25)
    groups = network.parameter_groups()
    assert [group["lr_scale"] for group in groups] == ([1.0, 0.25] if train_pool else [1.0])
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in network.parameters() if p.requires_grad}
    if train_pool:
        assert {id(p) for p in groups[1]["params"]} == {id(p) for p in network.clip.pool.parameters()}
    assert network.log_scale.requires_grad == learn_scale
    assert float(network.log_scale.detach().exp()) == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["resnet", "vit", "timm"])
def test_descriptions_are_outputs_of_the_towers_in_float32(tmp_path, kind):
    """Mean features, CLIP's image feature and its cosines with the class names do not depend on autocast."""
    network = build(tiny_clip(tmp_path, kind))
    side = network.clip.image_size
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))
    features = network.features(images)
    (grid, g), (scores,) = network.describer()(features)
    spatial = features.flatten(2).mean(2) if features.ndim == 4 else features.mean(1)
    torch.testing.assert_close(grid, spatial, atol=1e-6, rtol=0)
    with torch.no_grad():
        image = torch.nn.functional.normalize(network.clip.image_tokens(images).g, dim=-1)
    text = torch.nn.functional.normalize(network.clip.encode_texts([f"a photo of a {n}." for n in NAMES]), dim=-1)
    torch.testing.assert_close(g, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores, image @ text.T, atol=1e-6, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = network.describer()(features)
    assert half.scores[0].dtype == half.descriptors[0].dtype == half.descriptors[1].dtype == torch.float32
    torch.testing.assert_close(half.descriptors[1], g, atol=1e-6, rtol=0)
    torch.testing.assert_close(half.scores[0], scores, atol=5e-3, rtol=0)  # the text is encoded in half precision
