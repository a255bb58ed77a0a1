"""Compares loss terms of the systems for partial labels with slow recomputations: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbsa_lightning.networks.base import NetworkOutput
from cbsa_lightning.networks.contrast import contrast
from cbsa_lightning.networks.dsrb import DSRB, QuadrantBlending
from cbsa_lightning.networks.hooks import Batch, Moment, Seen
from cbsa_lightning.networks.hst import LearnedTransfer
from cbsa_lightning.networks.label_pairs import LabelPairs, pair_loss
from cbsa_lightning.networks.processes import WholeBatch
from cbsa_lightning.networks.prototypes import clustered, due, quadrant_means, sampled_positives
from cbsa_lightning.networks.sarb import ClusterBlending
from cbsa_lightning.networks.sst import Transfer
from cbsa_lightning.networks.transfer import mean_cosine, remember
from partial import arrays, check_gradients
from reference import semantic

pytestmark = pytest.mark.usefixtures("in_double")
TARGETS = torch.tensor([[1, 1, 0, -1], [1, -1, 0, 1], [0, 1, 1, -1], [1, 0, -1, 0]], dtype=torch.int8)
BATCH, CLASSES, DIM = 4, 4, 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def a_batch(logits, features, targets=TARGETS, notes=None):
    output = NetworkOutput(logits, label_features=features, notes=notes)
    return Batch(output, targets, WholeBatch(torch.ones(len(targets), dtype=torch.bool)))


@pytest.mark.parametrize("targets", [TARGETS, TARGETS.clamp(max=0), torch.full_like(TARGETS, -1)])
def test_contrast(targets):
    """Covers images with common labels, without common labels, and without known labels."""
    features, moment = drawn(BATCH, CLASSES, DIM), Moment(2, 1, 5, 3)
    found = contrast(features, targets, moment.generator())

    def value():
        stream = moment.generator()
        orders = lambda number: torch.randperm(number, generator=stream).tolist()  # noqa: E731
        return np.array(semantic.contrast(features.detach().numpy(), targets.numpy(), orders))

    np.testing.assert_allclose(found.detach().numpy(), value(), atol=1e-12)
    check_gradients(found, {"features": features}, value)


def test_label_pairs():
    torch.manual_seed(0)
    pairs, features = LabelPairs(CLASSES, DIM, 5).double(), drawn(BATCH, CLASSES, DIM)
    logits, weights = pairs(features), arrays(pairs)

    def value():
        return semantic.pair_logits(features.detach().numpy(), weights)

    np.testing.assert_allclose(logits.detach().numpy(), value(), atol=1e-12)
    check_gradients(logits, {"features": features, **dict(pairs.named_parameters())}, value)
    expected = semantic.given_known(logits.detach().numpy(), TARGETS.numpy())
    np.testing.assert_allclose(pairs.given_known(logits.detach(), TARGETS).numpy(), expected, atol=1e-12)


def test_pair_loss():
    pairs, logits = LabelPairs(CLASSES, DIM, 5), drawn(BATCH, 6)
    found = pair_loss(logits, pairs.targets(TARGETS)).mean()

    def value():
        return np.array(semantic.pair_loss(logits.detach().numpy(), TARGETS.numpy()))

    np.testing.assert_allclose(found.detach().numpy(), value(), atol=1e-12)
    check_gradients(found, {"logits": logits}, value)


def test_bank_of_known_positives():
    bank, features = torch.zeros(CLASSES, 3, DIM, dtype=torch.float64), drawn(BATCH, CLASSES, DIM).detach()
    remember(bank, features, TARGETS)
    assert torch.equal(bank[0], features[[0, 1, 3], 0])  # the oldest feature is removed
    assert torch.equal(bank[3], torch.stack([features[1, 3], bank[3, 1], bank[3, 1]]))
    assert not bank[3, 1:].any()
    newer = features + 1
    newer[1, 3] = torch.nan
    remember(bank, newer, TARGETS)
    assert torch.equal(bank[3, 0], features[1, 3])
    assert torch.equal(bank[2, :2], torch.stack([newer[2, 2], features[2, 2]]))
    expected = semantic.mean_cosine(features.numpy(), bank.numpy())
    np.testing.assert_allclose(mean_cosine(features, bank).numpy(), expected, atol=1e-12)


class Parts(torch.nn.Module):
    """The parts of a network that the hooks use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pairs = LabelPairs(CLASSES, DIM, 5).double()
        with torch.no_grad():
            self.pairs.bias.uniform_(1, 5)  # makes some pairs certain


@pytest.mark.parametrize("epoch", [0, 5, 7])
def test_terms_of_sst(epoch):
    """Compares all terms together, for random labels, logits and features of a batch."""
    network, moment = Parts(), Moment(epoch, 2, 4, 0)
    logits = drawn(BATCH, CLASSES, seed=1)
    features = (1 + 0.7 * drawn(BATCH, CLASSES, DIM, seed=2).detach()).requires_grad_()
    hooks = Transfer(CLASSES, DIM, 5, 3).double()
    remember(hooks.bank, features + 0.01 * drawn(BATCH, CLASSES, DIM, seed=3), torch.ones_like(TARGETS))
    hooks.highest_margin, hooks.lowest_margin = 0.9, 0.5
    hooks.margin_step = 0.2
    terms = hooks.terms(network, a_batch(logits, features), moment)
    bank, weights = hooks.bank.numpy().copy(), arrays(network.pairs)
    margin = {0: 2, 5: 0.9, 7: 0.5}[epoch]
    unknown = TARGETS.numpy() < 0
    seen = semantic.pair_logits(features.detach().numpy(), weights)
    within = (semantic.given_known(seen, TARGETS.numpy()) >= margin) & unknown
    across = (semantic.mean_cosine(features.detach().numpy(), bank) >= margin) & unknown
    if epoch == 7:
        assert within.any()
        assert across.any()

    def value():
        x, z = logits.detach().numpy(), features.detach().numpy()
        ramp = min(epoch + 0.5, 1)
        stream = moment.generator()
        orders = lambda number: torch.randperm(number, generator=stream).tolist()  # noqa: E731
        found = 10 * ramp * semantic.pair_loss(semantic.pair_logits(z, weights), TARGETS.numpy())
        found += 0.05 * ramp * semantic.contrast(z, TARGETS.numpy(), orders)
        if epoch >= 5:
            labels = TARGETS.numpy() == 1
            found += semantic.soft_bce(x, labels | within, ~unknown | within)
            found += semantic.soft_bce(x, labels | across, ~unknown | across)
        return np.array(found)

    total = sum(terms.values())
    np.testing.assert_allclose(total.detach().numpy(), value(), atol=1e-12)
    wanted = {"features": features, **dict(network.pairs.named_parameters())}
    check_gradients(total, {**wanted, "logits": logits} if epoch >= 5 else wanted, value)


# Prototypes and blending -------------------------------------------------------------------------------------------


def test_epochs_that_update_prototypes():
    assert [epoch for epoch in range(17) if due(Moment(epoch), 5, 5)] == [5, 10, 15]


def test_known_positives_are_sampled():
    labels = torch.randint(-1, 2, (50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    labels[:, 2] = -1
    labels[4:, 1] = 0
    chosen = sampled_positives(labels, 5, Moment(5, seed=1))
    assert chosen.sum(0).tolist() == [5, int((labels[:4, 1] == 1).sum()), 0]
    assert not (chosen & (labels != 1)).any()
    assert torch.equal(chosen, sampled_positives(labels, 5, Moment(5, seed=1)))
    assert not torch.equal(chosen, sampled_positives(labels, 5, Moment(10, seed=1)))


def seen_of(classes, features, notes=None):
    return Seen(torch.arange(len(classes)), torch.tensor(classes), features, notes)


def test_centers_of_k_means():
    features = torch.cat([torch.zeros(3, 2), torch.ones(3, 2) * 5, torch.tensor([[1.0, 2.0]])])
    features[:6] += 0.01 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    found = clustered(seen_of([0] * 6 + [1], features), 3, 2, Moment(5))
    means = torch.stack([features[:3].mean(0), features[3:6].mean(0)])
    torch.testing.assert_close(found[0][found[0][:, 0].argsort()], means)
    assert found[1].tolist() == [[1, 2], [1, 2]]  # fewer features than centers
    assert not found[2].any()  # a class without known positives


def test_means_of_quadrants():
    features = drawn(5, 2).detach()
    found = quadrant_means(seen_of([0, 0, 0, 0, 1], features, torch.tensor([1, 1, 2, 2, 3])), 3)
    torch.testing.assert_close(found[0, 1], (features[0] + features[1]) / 2)
    torch.testing.assert_close(found[0, 2], (features[2] + features[3]) / 2)
    torch.testing.assert_close(found[0, 0], features[:4].mean(0))
    torch.testing.assert_close(found[1], features[4].expand(4, 2))
    assert not found[2].any()


class Linear(torch.nn.Module):
    """Classifies label features with one vector per class and the sum of the other classes' features."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(drawn(CLASSES, DIM, seed=8).detach())

    def classify(self, own):
        return ((own + 0.3 * own.sum(1, keepdim=True).tanh()) * self.weight).sum(-1)

    def by_hand(self, own):
        return ((own + 0.3 * np.tanh(own.sum(1, keepdims=True))) * self.weight.detach().numpy()).sum(-1)


def check_blending(hooks, network, batch, moment, others, chosen_of):
    """Compares values and gradients of the terms for given prototypes and labels to blend."""
    targets, features = batch.targets.numpy(), batch.features
    terms = hooks.terms(network, batch, moment)
    unknown = targets < 0
    partners = features.detach().numpy()[::-1]
    mixed = unknown & (targets[::-1] == 1)
    assert mixed.any()

    def value():
        z = features.detach().numpy()
        stream = moment.generator()
        orders = lambda number: torch.randperm(number, generator=stream).tolist()  # noqa: E731
        found = 0.05 * semantic.contrast(z, targets, orders)
        chosen = chosen_of(stream)
        assert (chosen.sum(1) == unknown.any(1)).all()
        alpha, beta = float(hooks.alpha.detach()), float(hooks.beta.detach())
        partners = z[::-1]
        found += semantic.blended(z, targets, partners, mixed, alpha, network.by_hand)
        return np.array(found + semantic.blended(z, targets, others(stream), chosen, beta, network.by_hand))

    assert partners.shape == features.shape
    total = sum(terms.values())
    np.testing.assert_allclose(total.detach().numpy(), value(), atol=1e-12)
    wanted = {"features": features, "weight": network.weight, "alpha": hooks.alpha, "beta": hooks.beta}
    check_gradients(total, wanted, value)


FULL = torch.tensor([[1, 1, 0, -1], [1, -1, 0, 1], [0, 1, 1, 1], [-1, 0, -1, 1]], dtype=torch.int8)


def first_choice(targets):
    def chosen(stream):
        priority = torch.rand(len(targets), CLASSES, generator=stream) * (targets < 0)
        return (torch.nn.functional.one_hot(priority.argmax(1), CLASSES).bool() & (targets < 0)).numpy()

    return chosen


def test_terms_of_sarb():
    """The third image has no unknown labels, so it is not blended."""
    hooks, network = ClusterBlending(CLASSES, DIM, 3, 5, 5, 10).double(), Linear()
    hooks.prototypes.copy_(drawn(CLASSES, 3, DIM, seed=4).detach())
    features = drawn(BATCH, CLASSES, DIM, seed=5)

    def others(stream):
        which = int(torch.randint(3, (1,), generator=stream))
        return np.broadcast_to(hooks.prototypes[:, which].numpy(), (BATCH, CLASSES, DIM))

    batch = a_batch(network.classify(features), features, FULL)
    check_blending(hooks, network, batch, Moment(6, 1, 4, 2), others, first_choice(FULL))


def test_blending_skips_early_epochs_and_classes_without_prototypes():
    hooks, network, features = ClusterBlending(CLASSES, DIM, 3, 5, 5, 10).double(), Linear(), drawn(4, 4, DIM)
    batch = a_batch(network.classify(features), features, FULL)
    assert set(hooks.terms(network, batch, Moment(4))) == {"contrast"}
    found = hooks.terms(network, batch, Moment(5))
    plain = semantic.mean_bce(batch.output.logits.detach().numpy(), FULL.numpy())
    assert float(found["prototype"].detach()) == pytest.approx(plain)


# HST ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "margin"), [(1, 1.0), (6, 0.6), (6, 1.0)])
def test_terms_of_hst(epoch, margin):
    network, moment = Parts(), Moment(epoch, 2, 4, 0)
    logits = drawn(BATCH, CLASSES, seed=1)
    features = (1 + 0.7 * drawn(BATCH, CLASSES, DIM, seed=2).detach()).requires_grad_()
    hooks = LearnedTransfer(CLASSES, DIM, 2, 5, 5, 10).double()
    with torch.no_grad():
        hooks.prototypes.copy_(1 + 0.5 * drawn(CLASSES, 2, DIM, seed=3))
        hooks.within_margin.fill_(margin)
        hooks.across_margin.fill_(margin + 0.05)
    terms = hooks.terms(network, a_batch(logits, features), moment)
    weights, targets = arrays(network.pairs), TARGETS.numpy()
    unknown, labels = targets < 0, targets == 1
    side = np.where(unknown, 0, 2 * targets.astype(int) - 1)

    def value():
        x, z = logits.detach().numpy(), features.detach().numpy()
        stream = moment.generator()
        orders = lambda number: torch.randperm(number, generator=stream).tolist()  # noqa: E731
        pairs = semantic.pair_logits(z, weights)
        found = 10 * semantic.pair_loss(pairs, targets) + 0.05 * semantic.contrast(z, targets, orders)
        if epoch < 5:
            return np.array(found)
        cosine = semantic.mean_cosine(z, hooks.prototypes.numpy())
        margins = [float(p.detach()) for p in (hooks.within_margin, hooks.across_margin)]
        for known, at in zip((semantic.given_known(pairs, targets), cosine), margins, strict=True):
            score = np.clip(known - at, 0, 1)
            positive = (score > 0) & unknown
            found += semantic.soft_bce(x, labels | positive, ~unknown | positive)
            found += 0.1 * semantic.soft_bce(score, labels, ~unknown)
            assert positive.any() == (margin < 1)
        return np.array(found + 0.05 * (1 - side * cosine).mean())

    total = sum(terms.values())
    np.testing.assert_allclose(total.detach().numpy(), value(), atol=1e-12)
    if margin < 1:
        wanted = {"features": features, **dict(network.pairs.named_parameters())}
        margins = {"within": hooks.within_margin, "across": hooks.across_margin}
        check_gradients(total, {**wanted, "logits": logits, **margins}, value)


def test_positives_move_toward_their_prototypes():
    """Positives move toward their prototypes; the released code has the opposite sign."""
    hooks, features = LearnedTransfer(CLASSES, DIM, 2, 5, 5, 10).double(), drawn(BATCH, CLASSES, DIM)
    hooks.prototypes.copy_(drawn(CLASSES, 2, DIM, seed=3).detach())
    term = hooks.terms(Parts(), a_batch(drawn(BATCH, CLASSES, seed=1), features), Moment(5))["prototype"]
    (gradient,) = torch.autograd.grad(term, features)
    nearer = mean_cosine(features - 0.1 * gradient, hooks.prototypes) > mean_cosine(features, hooks.prototypes)
    assert nearer[TARGETS == 1].all()
    assert not nearer[TARGETS == 0].any()


# DSRB --------------------------------------------------------------------------------------------------------------


def test_terms_of_dsrb_equal_those_of_blended_maps():
    """Blending sums, as implemented here, equals summing blended maps, as in the released code."""
    torch.manual_seed(0)
    hooks, network = QuadrantBlending(CLASSES, DIM, 5, 5, 10).double(), Linear()
    found = torch.randn(BATCH, DIM, 4, 4, dtype=torch.float64)
    attention = torch.randn(BATCH, CLASSES, 16, dtype=torch.float64).mul(3).softmax(-1)
    notes = DSRB.notes(None, found, attention)
    maps, quadrants = semantic.maps_of(found.numpy(), attention.numpy())
    assert (notes.numpy() == quadrants).all()
    assert len(set(quadrants.flatten())) == 4
    features = torch.from_numpy(maps.sum((1, 2))).requires_grad_()
    rows, classes = (FULL == 1).nonzero(as_tuple=True)
    with torch.no_grad():
        hooks.before_epoch(Seen(rows, classes, features[rows, classes], notes[rows, classes]), Moment(5))
    prototypes = semantic.map_prototypes(maps, quadrants, FULL.numpy())

    def others(stream):
        turn = torch.randint(1, 4, (BATCH, CLASSES), generator=stream).numpy()
        other = (quadrants - turn) % 4
        assert (other != quadrants).all()
        whole = [[prototypes[k, other[b, k]] for k in range(CLASSES)] for b in range(BATCH)]
        return np.array(whole).sum((2, 3))

    batch = a_batch(network.classify(features), features, FULL, notes)
    check_blending(hooks, network, batch, Moment(6, 1, 4, 2), others, first_choice(FULL))
