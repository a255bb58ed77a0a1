"""Compares the parts of SSGRL with slow recomputations: values, gradients, and the size of intermediate tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.losses import MeanBinaryCrossEntropy
from cbsa_lightning.networks import decoupling
from cbsa_lightning.networks.decoupling import SemanticDecoupling
from cbsa_lightning.networks.gated_graph import conditional_cooccurrence
from cbsa_lightning.networks.gcn_ml import GCNML, GraphClassifiers, neighbor_graph
from cbsa_lightning.networks.ssgrl import SSGRL
from partial import SMALL, TinyWords, arrays, check_gradients
from reference import semantic
from tiny_data import CLASSES, SIZE

LABELS = torch.tensor([[1, 1, 0, -1, 0], [1, -1, 0, 1, 0], [0, 1, 1, -1, 0], [1, 0, -1, 0, -1]], dtype=torch.int8)


def network(**settings):
    torch.manual_seed(0)
    return SSGRL(CLASSES, **{**SMALL, "words": TinyWords, "attention_width": 7, **settings})


@pytest.mark.parametrize("at_once", [1, 30, 1 << 18])
def test_decoupling_equals_the_reference(at_once, in_double, monkeypatch):
    """The result does not depend on the number of products that are computed at a time."""
    monkeypatch.setitem(decoupling._AT_ONCE, "cpu", at_once)
    torch.manual_seed(0)
    part = SemanticDecoupling(4, 3, 5).double()
    features = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    words = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    found, attention = part(features, words)
    weights = arrays(part)

    def value():
        return semantic.decouple(features.detach().numpy(), words.detach().numpy(), weights)[0]

    np.testing.assert_allclose(found.detach().numpy(), value(), atol=1e-12)
    expected = semantic.decouple(features.detach().numpy(), words.detach().numpy(), weights)[1]
    np.testing.assert_allclose(attention.detach().numpy(), expected, atol=1e-12)
    check_gradients(found, {"features": features, "words": words, **dict(part.named_parameters())}, value)


def test_graph_of_known_positives():
    found = conditional_cooccurrence(LABELS)
    np.testing.assert_allclose(found.numpy(), semantic.cooccurrence(LABELS.numpy()), rtol=1e-6)
    assert found.isfinite().all()
    assert not found[4].any()  # a class without a known positive


def test_classification_equals_the_reference():
    net = network(steps=2).double()
    net.trunk.width = None
    torch.manual_seed(1)
    net.decouple, net.merge = None, torch.nn.Linear(8, 4).double()
    net.spread = type(net.spread)(4, 2).double()
    net.weight = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    net.graph.copy_(conditional_cooccurrence(LABELS))
    own = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = {name: value for name, value in arrays(net).items() if not name.startswith("trunk.")}
    logits = net.classify(own)

    def value():
        return semantic.classify(own.detach().numpy(), net.graph.numpy(), weights, steps=2)

    np.testing.assert_allclose(logits.detach().numpy(), value(), atol=1e-12)
    parts = {n: p for n, p in net.named_parameters() if not n.startswith("trunk.")}
    check_gradients(logits, {"own": own, **parts}, value)


def test_mean_over_known_entries():
    logits = torch.randn(LABELS.shape, dtype=torch.float64, requires_grad=True)
    loss = MeanBinaryCrossEntropy()(logits, LABELS).sum() / len(LABELS)
    assert float(loss.detach()) == pytest.approx(semantic.mean_bce(logits.detach().numpy(), LABELS.numpy()), rel=1e-6)
    assert not torch.autograd.grad(loss, logits)[0][LABELS < 0].any()
    assert float(MeanBinaryCrossEntropy()(logits, torch.full_like(LABELS, -1)).sum()) == 0


def test_only_the_last_stage_is_trained():
    net = network().train()
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    output = net(net.features(images), attention=True)
    output.logits.square().sum().backward()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert not any(name.startswith("trunk.frozen") for name in trained)
    assert any(name.startswith("trunk.last") for name in trained)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("trunk.last") for name in moved)
    torch.testing.assert_close(output.attention.sum((2, 3)), torch.ones(3, 5))
    assert output.label_features.shape == (3, 5, net.dim)
    assert not net.features(images).requires_grad


def test_other_backbones_are_refused():
    with pytest.raises(ConfigError, match=r"test_vit does not have conv1.*resnet101"):
        network(backbone="test_vit")


def test_each_frozen_part_has_a_fingerprint():
    assert network().frozen_weights == network().frozen_weights
    other = network()
    next(iter(other.trunk.frozen.parameters())).data.add_(1)
    assert other.frozen_weights != network().frozen_weights


# GCN-ML ------------------------------------------------------------------------------------------------------------


def test_neighbor_graph_equals_the_reference():
    together = conditional_cooccurrence(LABELS).double()
    expected = semantic.neighbor_graph(together.numpy(), 0.5, 0.25)
    np.testing.assert_allclose(neighbor_graph(together, 0.5, 0.25).numpy(), expected, rtol=1e-6)
    assert (expected[4] == [0, 0, 0, 0, 1]).all()  # a class without known positives has no neighbors


def test_graph_classifiers_equal_the_reference():
    torch.manual_seed(0)
    head = GraphClassifiers(4, 5, torch.randn(5, 3), 6).double()
    head.graph.copy_(torch.rand(5, 5))
    features = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    logits, weights = head(features).logits, arrays(head)

    def value():
        return semantic.graph_classifiers(features.detach().numpy(), weights)

    np.testing.assert_allclose(logits.detach().numpy(), value(), atol=1e-12)
    check_gradients(logits, {"features": features, **dict(head.named_parameters())}, value)


def test_gcn_ml_trains_its_trunk_with_a_lower_learning_rate():
    net = GCNML(CLASSES, **SMALL, words=TinyWords, hidden=8)
    rest, trunk = net.parameter_groups()
    assert (rest["lr_scale"], trunk["lr_scale"]) == (1.0, 0.1)
    assert {id(p) for p in trunk["params"]} == {id(p) for p in net.trunk.parameters()}
    net.hooks.before_training(net, LABELS)
    together = conditional_cooccurrence(LABELS)
    torch.testing.assert_close(net.head.graph, neighbor_graph(together, 0.4, 0.25))
    with pytest.raises(ConfigError, match="threshold must be a number"):
        GCNML(CLASSES, **SMALL, words=TinyWords, threshold=2.0)
