"""Grad-CAM, attention and value-path similarity of images."""

from __future__ import annotations

import pytest
import torch

from cbsa_lightning.errors import DataError
from cbsa_lightning.inference.classifier import Classifier
from cbsa_lightning.inference.contexts import context_probabilities
from cbsa_lightning.inference.localization import grad_cam, label_maps, similarity_maps
from cbsa_lightning.networks.base import Network, NetworkOutput
from cbsa_lightning.networks.cbsa import CBSANetwork
from reference.grad_cam import grad_cam as plain_grad_cam
from tiny_clip import tiny_clip

NAMES = ["red", "green", "blue"]
SMALL = {"num_contexts": 2, "prompt_length": 2, "decoder_layers": 1, "decoder_heads": 4, "decoder_feedforward": 16}


def network_of(clip, **settings):
    torch.manual_seed(0)
    network = CBSANetwork(NAMES, clip=str(clip), **SMALL, **settings)
    with torch.no_grad():  # an untrained decoder has branches that are zero
        for parameter in network.decoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.eval()


def classifier_of(clip, size=128):
    return Classifier(network_of(clip), NAMES, torch.full((3,), 0.5), size)


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_grad_cam_equals_the_plain_computation(clip_folder, images, in_double):
    network = network_of(clip_folder).double()
    with torch.no_grad():
        features, text = network.features(images[:2]), network.encode_text()
    assert features.shape[2:] == (4, 4)
    classes = torch.tensor([[2, 0], [1, 2]])
    found = grad_cam(network, features, text, classes)
    assert found.shape == (2, 2, 4, 4)
    assert (found > 0).any()
    for i in range(2):
        for j, k in enumerate(classes[i].tolist()):
            with torch.no_grad():
                expected = plain_grad_cam(lambda x, k=k: network(x[None], text).logits[0, k], features[i])
            torch.testing.assert_close(found[i, j], expected, rtol=1e-5, atol=1e-9)


def test_grad_cam_of_a_vit_omits_the_class_token(tmp_path, images, in_double):
    network = network_of(tiny_clip(tmp_path, "vit")).double()
    with torch.no_grad():
        features, text = network.features(images[:1, :, :64, :64]), network.encode_text()
    token, places = features[0, :1], features[0, 1:].T.reshape(-1, 4, 4)

    def logit(x):
        return network(torch.cat([token, x.flatten(1).T])[None], text).logits[0, 1]

    with torch.no_grad():
        expected = plain_grad_cam(logit, places)
    found = grad_cam(network, features, text, torch.tensor([[1]]))
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-5, atol=1e-9)


def test_similarity_is_the_cosine_above_its_mean(clip_folder, images):
    network = network_of(clip_folder)
    with torch.no_grad():
        features = network.features(images[:1])
        tokens, texts = network.clip.pool.values(features).l[0], network.zero_shot_text()
    found = similarity_maps(network, features, texts)[0]
    for k in range(3):
        values = [torch.cosine_similarity(token, texts[k], dim=0) for token in tokens]
        mean = sum(values) / len(values)
        expected = torch.stack([max(value - mean, torch.zeros(())) for value in values]).reshape(4, 4)
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-6)


def test_maps_belong_to_the_chosen_classes_of_each_image(clip_folder, images):
    classifier = classifier_of(clip_folder)
    everything = label_maps(classifier, images, torch.arange(3).expand(5, 3))
    torch.testing.assert_close(everything.attention, classifier.attention(images))
    classes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [2, 1]])
    found = label_maps(classifier, images, classes, batch_size=2)
    for maps, expected in zip(found, everything, strict=True):
        chosen = torch.stack([expected[i, row] for i, row in enumerate(classes)])
        torch.testing.assert_close(maps, chosen, rtol=1e-4, atol=1e-6)


def test_the_network_runs_once_per_image(clip_folder, images):
    classifier, sizes = classifier_of(clip_folder), []
    classifier.network.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    found = label_maps(classifier, images, torch.zeros(5, 1).long(), batch_size=2)
    assert sizes == [2, 2, 1]
    assert not any(maps.requires_grad for maps in found)


def test_maps_leave_no_gradients(clip_folder, images):
    classifier = classifier_of(clip_folder)
    label_maps(classifier, images[:1], torch.tensor([[0]]))
    assert all(parameter.grad is None for parameter in classifier.network.parameters())


def test_a_network_without_a_decoder_has_no_attention(clip_folder, images):
    torch.manual_seed(0)
    network = CBSANetwork(NAMES, clip=str(clip_folder), semantic_alignment=False, **SMALL)
    found = label_maps(Classifier(network, NAMES, torch.full((3,), 0.5), 128), images, torch.zeros(5, 1).long())
    assert found.attention is None
    assert found.grad_cam.shape == (5, 1, 4, 4)


class Pixels(Network):
    """A network without a frozen part."""

    def features(self, images):
        return images.float()

    def forward(self, features, text=None, *, attention=False):
        return NetworkOutput(features.mean((2, 3)))


def test_networks_without_a_frozen_map_are_refused(images):
    classifier = Classifier(Pixels(), NAMES, torch.full((3,), 0.5), 64)
    with pytest.raises(DataError, match=r"Pixels has no frozen feature map.*such as CBSA"):
        label_maps(classifier, images, torch.zeros(5, 1).long())
    with pytest.raises(DataError, match=r"no context head.*num_contexts"):
        context_probabilities(classifier, images)


def test_classes_must_fit_the_images(clip_folder, images):
    with pytest.raises(DataError, match=r"5 images do not fit classes \(4, 1\)"):
        label_maps(classifier_of(clip_folder), images, torch.zeros(4, 1).long())


def test_context_probabilities_are_those_of_the_context_head(clip_folder, images):
    classifier = classifier_of(clip_folder)
    found = context_probabilities(classifier, images, batch_size=2)
    with torch.no_grad():
        logits = classifier.network(classifier.network.features(images)).context_logits
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(found, expected)
