import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbsa_lightning.errors import DataError
from cbsa_lightning.method import thresholds
from cbsa_lightning.method.labelers import TopOne, pseudo_labels
from cbsa_lightning.method.thresholds import class_thresholds
from reference import labelers as reference

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Runs a test with all scores in one block and with small blocks."""
    if request.param == "many blocks":
        monkeypatch.setattr(thresholds, "BLOCK", 250)
        monkeypatch.setattr(thresholds, "STRIP", 12)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        np.testing.assert_array_equal(one.numpy(), np.asarray(other))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 100, 997])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_thresholds_equal_the_sorted_definition(blocks, n, dtype, levels):
    positives = torch.tensor([0, 1, 29, 50, 57, 99, 100])  # including classes without positives and without negatives
    generator = torch.Generator().manual_seed(n)
    scores = (torch.randint(levels + 1, (n, 7), generator=generator) / levels).to(dtype)
    before = scores.clone()
    for etas in [("1.0", "0.998"), ("0.29", "0.57"), ("0", "1"), ("1", "0"), ("0", "0")]:
        expected = reference.thresholds(scores.float().numpy(), positives, torch.full((7,), 100), *etas)
        rates, numbers = positives.double() / 100, [float(eta) for eta in etas]
        found = class_thresholds(scores, rates, *numbers)
        assert_equal(found, expected)
    assert torch.equal(scores, before)
    labels = pseudo_labels(scores, *found)
    np.testing.assert_array_equal(labels.numpy(), reference.label(scores.float().numpy(), *expected))


def test_counts_are_exact_for_every_possible_rate():
    m, n = 285, 1000
    counts = torch.arange(m + 1)
    scores = (torch.arange(n) / 1024).half()[:, None].expand(n, m + 1)  # exact in float16, no ties
    labels = pseudo_labels(scores, *class_thresholds(scores, counts.double() / m, 1.0, 1.0))
    assert (labels == 1).sum(dim=0).tolist() == [count * n // m for count in range(m + 1)]
    assert (labels == 0).sum(dim=0).tolist() == [(m - count) * n // m for count in range(m + 1)]


def test_thresholds_do_not_depend_on_memory_layout_or_modify_scores(blocks):
    rates = torch.tensor([0.1, 0.0, 0.5, 1.0], dtype=torch.float64)
    scores = torch.rand(101, 4)
    wide = torch.rand(202, 12)
    wide[::2, ::3] = scores
    expected = class_thresholds(scores, rates, 0.7, 0.9)
    for other in (scores.T.contiguous().T, wide[::2, ::3], scores.clone().requires_grad_()):
        before = other.detach().clone()
        found = class_thresholds(other, rates, 0.7, 0.9)
        assert_equal(found, expected)
        assert not found[0].requires_grad
        assert torch.equal(other, before)
        assert torch.equal(pseudo_labels(other, *found), pseudo_labels(scores, *expected))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-2, 2, width=32)))
def test_selection_equals_sorting(columns):
    classes, n = columns.shape
    generator = np.random.default_rng(n)
    r_pos = torch.from_numpy(generator.integers(0, n + 1, classes))
    r_neg = torch.from_numpy(generator.integers(0, n - r_pos.numpy() + 1))
    by_sort = thresholds._sorted(torch.from_numpy(columns.copy()), r_pos, r_neg)
    assert_equal(thresholds._partitioned(torch.from_numpy(columns.copy()), r_pos, r_neg), by_sort)


def test_descending_scores_are_selected_in_linear_time():
    """``torch.kthvalue`` needs minutes for these scores."""
    scores = torch.arange(1_000_000, 0, -1.0)[:, None] / 1_000_000
    tau_pos, tau_neg = class_thresholds(scores, torch.tensor([0.03], dtype=torch.float64), 1.0, 1.0)
    assert torch.equal(tau_pos, scores[29_999])
    assert torch.equal(tau_neg, scores[30_000])


def test_scores_that_are_not_finite_are_counted_over_all_strips(blocks):
    scores = torch.rand(50, 3, dtype=torch.float64)
    scores[2, 1] = scores[43, 1] = math.nan
    scores[44, 2] = -1e300  # infinite in float32, the type used for comparisons
    for call in (lambda: class_thresholds(scores, torch.zeros(3)), lambda: TopOne()(scores, torch.zeros(3))):
        with pytest.raises(DataError, match=r"3 of 150 scores are not finite; classes \(counts\): 1 \(2\), 2 \(1\)"):
            call()


MEMORY = """
import torch
from cbsa_lightning.method import labelers
from cbsa_lightning.method import thresholds

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(scores):
    peaks = [peak()]
    labelers.pseudo_labels(scores, torch.full((64,), 0.9), torch.full((64,), 0.1))
    peaks.append(peak())
    thresholds.class_thresholds(scores, torch.full((64,), 0.05, dtype=torch.float64))
    return [*peaks, peak()]

torch.set_num_threads(1)
thresholds.BLOCK = 24 * 400_000
run(torch.rand(1000, 64))  # what loads at the first call
print(*run(torch.empty(400_000, 64).uniform_()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_additional_memory_is_bounded():
    """Runs in a separate process. Blocks are above 32 MiB, so that the allocator returns them when they are freed."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    before, labeled, selected = (int(kib) / 1024 for kib in run.stdout.split())
    scores, labels, block = (400_000 * 64 * 4 / 2**20, 400_000 * 64 / 2**20, 24 * 400_000 * 4 / 2**20)
    assert labeled - before < labels + 12 < 2 * labels
    assert selected - before < block + 24 < scores


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_accelerator_and_cpu_give_equal_thresholds():
    scores, rates = torch.rand(100_000, 30).square().half(), torch.linspace(0, 1, 30, dtype=torch.float64)
    expected = class_thresholds(scores, rates)
    found = class_thresholds(scores.cuda(), rates)
    assert_equal([tau.cpu() for tau in found], expected)
    assert torch.equal(pseudo_labels(scores.cuda(), *found).cpu(), pseudo_labels(scores, *expected))
