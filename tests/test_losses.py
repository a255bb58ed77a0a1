import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    asymmetric_loss,
    binary_cross_entropy,
    context_loss,
    soft_target_loss,
)
from reference import losses as reference

SETTINGS = [(0.0, 4.0, 0.05), (1.0, 2.0, 0.05), (1.0, 4.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.1), (0.5, 1.5, 0.2)]


def batch(seed=0, shape=(16, 7), scale=6.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * scale
    return logits, torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "clip"), SETTINGS)
def test_asymmetric_loss_and_gradient_equal_the_definition(gamma_pos, gamma_neg, clip):
    logits, targets = batch()
    x = logits.clone().requires_grad_()
    loss = asymmetric_loss(x, targets, gamma_pos, gamma_neg, clip)
    loss.sum().backward()
    expected, gradient = reference.asymmetric(logits.numpy(), targets.numpy(), gamma_pos, gamma_neg, clip)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=2e-5, atol=1e-6)


def test_without_focus_and_margin_it_is_binary_cross_entropy():
    logits, targets = batch(1)
    expected = F.binary_cross_entropy_with_logits(logits, targets.float().clamp(min=0), reduction="none")
    expected = torch.where(targets >= 0, expected, 0.0)
    torch.testing.assert_close(asymmetric_loss(logits, targets, 0.0, 0.0, 0.0), expected)
    torch.testing.assert_close(binary_cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "clip"), SETTINGS)
def test_losses_of_extreme_logits_are_finite_in_every_precision(dtype, gamma_pos, gamma_neg, clip):
    logits = torch.tensor([-100.0, -20.0, -17.0, 0.0, 17.0, 20.0, 100.0], dtype=dtype).repeat(3, 1)
    targets = torch.tensor([1, 0, -1])[:, None].expand(3, 7)
    x = logits.clone().requires_grad_()
    loss = asymmetric_loss(x, targets, gamma_pos, gamma_neg, clip)
    loss.sum().backward()
    expected, gradient = reference.asymmetric(logits.float().numpy(), targets.numpy(), gamma_pos, gamma_neg, clip)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5, atol=1e-30)
    rounded = torch.from_numpy(gradient).to(dtype).double().numpy()
    np.testing.assert_allclose(x.grad.double().numpy(), rounded, rtol=2e-3, atol=1e-7)


def test_a_very_wrong_logit_has_a_corrective_gradient():
    x = torch.tensor([[-100.0, 100.0]], dtype=torch.float16, requires_grad=True)
    asymmetric_loss(x, torch.tensor([[1, 0]]), clip=0.0).sum().backward()
    assert x.grad.tolist() == [[-1.0, 1.0]]
    # With a margin, the gradient of a negative is proportional to (1 - p) / margin. It must not be 0 in float32,
    # although 1 - p is rounded to 0.
    x = torch.tensor([[20.0]], requires_grad=True)
    asymmetric_loss(x, torch.tensor([[0]]), clip=0.05).backward()
    assert x.grad.item() == pytest.approx(0.95**4 * math.exp(-20) / 0.05, rel=1e-3)


def test_unknown_entries_have_zero_loss_and_gradient():
    x = torch.full((3, 4), 5.0, requires_grad=True)
    loss = asymmetric_loss(x, torch.full((3, 4), -1, dtype=torch.int8))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3, 4))
    assert torch.equal(x.grad, torch.zeros(3, 4))


def test_losses_do_not_depend_on_autocast_and_grad_mode():
    logits, targets = batch(2)
    expected = asymmetric_loss(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(asymmetric_loss(logits, targets), expected)
    with torch.no_grad():
        loss = asymmetric_loss(logits.clone().requires_grad_(), targets)
        assert not loss.requires_grad
        assert not torch.is_grad_enabled()


@given(st.floats(-60, 60), st.floats(0.01, 20), st.sampled_from([0, 1]))
def test_the_loss_is_monotone_in_the_error(logit, step, target):
    worse = logit + step if target == 0 else logit - step
    pair = asymmetric_loss(torch.tensor([[logit, worse]]), torch.tensor([[target, target]]))
    assert pair[0, 1] >= pair[0, 0] >= 0


def test_loss_objects_equal_their_functions():
    logits, targets = batch(3)
    assert torch.equal(AsymmetricLoss(1.0, 2.0, 0.1)(logits, targets), asymmetric_loss(logits, targets, 1.0, 2.0, 0.1))
    assert torch.equal(BinaryCrossEntropy()(logits, targets), binary_cross_entropy(logits, targets))
    assert not AsymmetricLoss().state_dict()
    assert repr(AsymmetricLoss()) == "AsymmetricLoss(gamma_pos=0.0, gamma_neg=4.0, clip=0.05)"


@pytest.mark.parametrize("setting", [(-1.0, 4.0, 0.05), (0.0, math.nan, 0.05), (0.0, 4.0, 1.0), (0.0, 4.0, -0.1)])
def test_invalid_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="asymmetric loss"):
        AsymmetricLoss(*setting)


def test_invalid_targets_of_losses_are_refused():
    with pytest.raises(DataError, match="differ in shape"):
        asymmetric_loss(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int8))
    with pytest.raises(DataError, match="float32"):
        binary_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3))


def test_context_loss_equals_the_definition():
    logits, _ = batch(4, (9, 4))
    ids = torch.tensor([0, 1, 2, 3, -1, 0, -1, 2, 3])
    loss = context_loss(logits.half(), ids)
    np.testing.assert_allclose(loss.numpy(), reference.cross_entropy(logits.half().numpy(), ids.numpy()), rtol=1e-5)
    assert loss.dtype == torch.float32
    assert loss[ids == -1].tolist() == [0.0, 0.0]
    shares = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    shares = shares / shares.sum(dim=1, keepdim=True)
    shares[3] = 0.0
    soft = context_loss(logits, shares)
    np.testing.assert_allclose(soft.numpy(), reference.cross_entropy(logits.numpy(), shares.numpy()), rtol=1e-5)
    assert soft[3] == 0.0


def test_a_single_context_has_zero_loss_and_gradient():
    x = torch.randn(5, 1, requires_grad=True)
    loss = context_loss(x, torch.zeros(5, dtype=torch.int64))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(5))
    assert torch.equal(x.grad, torch.zeros(5, 1))


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(4, dtype=torch.int64), torch.zeros(5), torch.zeros(5, 2), torch.zeros(5, 3, dtype=torch.int64)],
)
def test_invalid_context_targets_are_refused(targets):
    with pytest.raises(DataError, match="context loss"):
        context_loss(torch.zeros(5, 3), targets)


@pytest.mark.parametrize("loss", [AsymmetricLoss(), BinaryCrossEntropy()])
def test_soft_targets_weight_the_losses_of_both_labels(loss):
    logits, hard = batch()
    assert torch.equal(soft_target_loss(loss, logits, hard.half()), loss(logits, hard))
    soft = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    soft[0] = -1
    logits.requires_grad_()
    mixed = soft_target_loss(loss, logits, soft)
    assert (mixed[0] == 0).all()
    for i, k in [(1, 0), (7, 3), (15, 6)]:
        t, z = soft[i, k], logits[i : i + 1, k : k + 1]
        yes, no = (float(loss(z, torch.full_like(z, y, dtype=torch.int8))) for y in (1, 0))
        assert float(mixed[i, k].detach()) == pytest.approx(float(t) * yes + (1 - float(t)) * no, rel=1e-5)
    mixed.sum().backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1:] != 0).all()


def test_cross_entropy_with_soft_targets_equals_torchs():
    logits, _ = batch()
    soft = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    expected = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    torch.testing.assert_close(soft_target_loss(BinaryCrossEntropy(), logits, soft), expected)
