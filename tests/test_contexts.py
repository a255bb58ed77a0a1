import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from cbsa_lightning.errors import ConfigError, DataError
from cbsa_lightning.method.contexts import (
    context_targets,
    cooccurrence,
    match_partition,
    partition,
    soft_context_targets,
)
from reference import contexts as reference

label_matrices = st.tuples(st.integers(1, 20), st.integers(1, 6)).flatmap(
    lambda shape: hnp.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 0, 1]))
)


def blocks(sizes, seed=0, leak=0.05):
    """Returns a co-occurrence matrix with strong links in blocks of the given sizes and weak links between them."""
    generator = np.random.default_rng(seed)
    member = np.repeat(np.arange(len(sizes)), sizes)
    strong = generator.uniform(0.5, 1.0, (len(member), len(member)))
    weak = generator.uniform(0.0, leak, strong.shape)
    return torch.from_numpy(np.where(member[:, None] == member, strong, weak)), torch.from_numpy(member)


def same_groups(a, b):
    return adjusted_rand_score(a, b) == 1.0


@settings(max_examples=50, deadline=None)
@given(label_matrices, st.sampled_from([1.0, 0.5]), st.data())
def test_cooccurrence_equals_counting_and_follows_reordering(labels, power, data):
    n, num_classes = labels.shape
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n)))
    images = data.draw(st.permutations(range(n)))
    classes = data.draw(st.permutations(range(num_classes)))
    x, w = torch.from_numpy(labels), torch.from_numpy(weights)
    found = cooccurrence(x, w, power)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, reference.cooccurrence(labels, weights, power), rtol=1e-12)
    torch.testing.assert_close(cooccurrence(x[images], w[images], power), found, rtol=1e-12, atol=0)
    torch.testing.assert_close(cooccurrence(x[:, classes], w, power), found[classes][:, classes], rtol=0, atol=0)
    torch.testing.assert_close(cooccurrence(x), torch.from_numpy(reference.cooccurrence(labels)), rtol=1e-12, atol=0)


def test_cooccurrence_counts_all_of_many_images():
    labels = torch.zeros(140_000, 3, dtype=torch.int8)
    labels[::2, 0] = labels[::7, 1] = 1
    expected = torch.tensor([[1, 1 / 7, 0], [1 / 2, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(cooccurrence(labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", [[4, 4], [3, 5, 7], [2, 2, 3, 9]])
@pytest.mark.parametrize("assign", ["cluster_qr", "kmeans"])
def test_partition_finds_blocks(sizes, assign):
    matrix, member = blocks(sizes)
    found = partition(matrix, len(sizes), assign)
    assert found.dtype == torch.int64
    assert found.tolist() == member.tolist()  # ids follow the order of the first class of each group


@pytest.mark.parametrize("seed", range(5))
def test_partition_of_a_tiny_matrix_is_the_best_normalized_cut(seed):
    matrix, _ = blocks([3, 4], seed, leak=0.3)
    found = reference.normalized_cut(matrix.numpy(), partition(matrix, 2).numpy())
    assert found == pytest.approx(reference.best_cut(matrix.numpy(), 2))


@pytest.mark.parametrize("assign", ["cluster_qr", "kmeans"])
def test_partition_equals_spectral_clustering(assign):
    matrix, _ = blocks([5, 6, 9], 3, leak=0.6)
    model = SpectralClustering(3, affinity="precomputed", assign_labels=assign, random_state=0)
    assert same_groups(partition(matrix, 3, assign), model.fit_predict((matrix + matrix.T).numpy() / 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.data())
def test_partition_follows_the_classes_and_ignores_the_diagonal(seed, num_contexts, data):
    matrix, _ = blocks([3, 4, 5], seed, leak=0.3)
    order = data.draw(st.permutations(range(12)))
    found = partition(matrix, num_contexts)
    assert same_groups(partition(matrix[order][:, order], num_contexts), found[order])
    diagonal = data.draw(st.lists(st.floats(0, 100), min_size=12, max_size=12))
    changed = matrix.clone()
    changed.fill_diagonal_(0).add_(torch.diag(torch.tensor(diagonal, dtype=torch.float64)))
    assert torch.equal(partition(changed, num_contexts), found)
    assert torch.equal(partition(matrix, num_contexts), found)
    assert set(found.tolist()) == set(range(num_contexts))


def test_partition_into_one_group_and_into_single_classes():
    matrix, _ = blocks([2, 3])
    assert partition(matrix, 1).tolist() == [0] * 5
    assert partition(matrix, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_class_that_is_always_alone_joins_the_largest_context():
    matrix, member = blocks([2, 5])
    alone = torch.zeros(8, 8, dtype=torch.float64)
    alone[1:, 1:] = matrix
    alone[0, 0] = 1.0
    assert partition(alone, 2).tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert member.tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_groups_without_any_link():
    matrix, member = blocks([2, 5, 3], leak=0.0)
    assert partition(matrix, 3).tolist() == member.tolist()
    assert partition(matrix, 2).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]  # the smallest group joins the largest
    four = partition(matrix, 4)  # one group must be split, although there are no links between groups
    assert len(four.unique()) == 4
    assert all(len(four[member == a].unique()) <= 2 for a in range(3))
    assert not set(four[member == 0].tolist()) & set(four[member == 1].tolist())


def test_partition_refuses_invalid_arguments():
    matrix, _ = blocks([2, 3])
    for num_contexts in (0, 6):
        with pytest.raises(ConfigError, match="between 1 and 5"):
            partition(matrix, num_contexts)
    matrix[1, 2] = math.nan
    with pytest.raises(DataError, match=r"\(1, 2\): nan"):
        partition(matrix, 2)
    with pytest.raises(DataError, match=r"\(0, 1\): -1"):
        partition(torch.tensor([[0.0, -1.0], [0.0, 0.0]]), 2)
    with pytest.raises(DataError, match="square"):
        partition(torch.zeros(2, 3), 2)
    with pytest.raises(ConfigError, match="only 0 of 4 classes ever occur together"):
        partition(torch.eye(4), 2)


def groups_of(path, num_contexts, assign="cluster_qr"):
    with np.load(path, allow_pickle=False) as file:
        names = [str(name) for name in file["names"]]
        found = partition(torch.from_numpy(file["adj"] / file["nums"][:, None]), num_contexts, assign)
    groups = [{n for n, c in zip(names, found.tolist(), strict=True) if c == k} for k in range(num_contexts)]
    for group in groups:
        print(sorted(group))
    return groups


def test_contexts_of_coco(realbench):
    groups = groups_of(realbench / "labels" / "cooc" / "coco2014_train_mlgcn.npz", 6)
    assert sorted(map(len, groups)) == [5, 8, 9, 16, 17, 25]
    for together in (
        {"giraffe", "zebra", "elephant", "sheep", "cow", "bear", "bird"},
        {"fork", "knife", "spoon", "dining table", "pizza", "cake", "bowl", "wine glass"},
        {"car", "bus", "truck", "traffic light", "stop sign", "parking meter", "person"},
        {"couch", "tv", "remote", "laptop", "keyboard", "mouse", "chair", "potted plant"},
        {"oven", "refrigerator", "microwave", "toaster", "sink", "toilet", "toothbrush"} - {"toothbrush"},
        {"baseball bat", "baseball glove", "sports ball", "tennis racket"},
    ):
        assert any(together <= group for group in groups), together


@pytest.mark.parametrize("assign", ["cluster_qr", "kmeans"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_contexts_of_voc_are_indoor_and_the_rest(realbench, part, assign):
    groups = groups_of(realbench / "labels" / "cooc" / f"voc2012_{part}_deephash.npz", 2, assign)
    assert {"bottle", "cat", "chair", "diningtable", "dog", "pottedplant", "sofa", "tvmonitor"} in groups
    assert sorted(map(len, groups)) == [8, 12]


def test_context_targets_of_voc_images(realbench):
    path = realbench / "labels" / "cooc" / "voc2012_train_deephash.npz"
    with np.load(path, allow_pickle=False) as file:
        labels, counts, nums = torch.from_numpy(file["Y"]), file["adj"], file["nums"]
    found = cooccurrence(labels).numpy() * nums[:, None]
    np.fill_diagonal(found, 0)
    np.testing.assert_allclose(found, counts, atol=1e-9)
    groups = partition(cooccurrence(labels), 2)
    targets = context_targets(labels, groups)
    expected = reference.targets(labels.numpy(), groups.tolist(), 2, nums)
    np.testing.assert_array_equal(targets.numpy(), expected)
    assert (targets == 1).sum() > 1000


@settings(max_examples=60, deadline=None)
@given(label_matrices, st.integers(1, 4), st.data())
def test_context_targets_equal_counting(labels, num_contexts, data):
    num_classes = labels.shape[1]
    ids = st.lists(st.integers(0, num_contexts - 1), min_size=num_classes, max_size=num_classes)
    groups = torch.tensor(data.draw(ids))
    counts = st.lists(st.integers(0, 3), min_size=num_classes, max_size=num_classes)
    frequency = torch.tensor(data.draw(counts))
    x = torch.from_numpy(labels)
    found = context_targets(x, groups, num_contexts, frequency)
    assert found.dtype == torch.int64
    assert found.tolist() == reference.targets(labels, groups.tolist(), num_contexts, frequency).tolist()
    own = reference.targets(labels, groups.tolist(), num_contexts, (labels == 1).sum(axis=0)).tolist()
    assert context_targets(x, groups).tolist() == own
    shares = soft_context_targets(x, groups, num_contexts)
    assert shares.shape == (len(labels), num_contexts)
    for row, target, share in zip(labels, own, shares.tolist(), strict=True):
        present = [int(groups[k]) for k in range(num_classes) if row[k] == 1]
        expected = [present.count(c) / max(len(present), 1) for c in range(num_contexts)]
        assert share == pytest.approx(expected)
        assert target == -1 if not present else share[target] == max(share)


def test_ties_go_to_the_rarest_label_of_the_tied_contexts():
    groups = torch.tensor([0, 0, 1, 1, 2])
    frequency = torch.tensor([9, 8, 7, 3, 1])
    labels = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, -1, 0, 0, 0]])
    assert context_targets(labels, groups, 3, frequency).tolist() == [1, 1, 2, 0, -1]
    assert context_targets(labels, groups, 3, -frequency).tolist() == [0, 0, 0, 0, -1]


def test_context_targets_refuse_invalid_arguments():
    labels = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(DataError, match="do not fit"):
        context_targets(labels, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"context ids in \[0, 2\)"):
        context_targets(labels, torch.tensor([0, 1, 2]), 2)
    with pytest.raises(DataError, match="context ids"):
        soft_context_targets(labels, torch.tensor([0, -1, 1]), 2)
    with pytest.raises(DataError, match="one frequency each"):
        context_targets(labels, torch.tensor([0, 1, 1]), 2, torch.ones(2))
    with pytest.raises(DataError, match="one finite weight"):
        cooccurrence(labels, torch.tensor([1.0, -1.0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.data())
def test_matched_partitions_undo_a_renaming(num_contexts, data):
    ids = st.lists(st.integers(0, num_contexts - 1), min_size=1, max_size=12)
    old = torch.tensor(data.draw(ids))
    name = torch.tensor(data.draw(st.permutations(range(num_contexts))))
    assert torch.equal(match_partition(name[old], old, num_contexts), old)
    new = torch.tensor(data.draw(st.lists(st.integers(0, num_contexts - 1), min_size=len(old), max_size=len(old))))
    matched = match_partition(new, old, num_contexts)
    assert same_groups(matched, new)
    assert (matched == old).sum() >= (new == old).sum()
    assert torch.equal(match_partition(new, torch.full_like(old, -1), num_contexts), new)


def test_matching_follows_the_larger_overlap():
    old = torch.tensor([0, 0, 0, 1, 1, 2])
    new = torch.tensor([2, 2, 0, 0, 0, 1])
    assert match_partition(new, old, 3).tolist() == [0, 0, 1, 1, 1, 2]
    with pytest.raises(DataError, match="differ in shape"):
        match_partition(new, old[:-1], 3)
    with pytest.raises(DataError, match="below 2"):
        match_partition(new, old, 2)
