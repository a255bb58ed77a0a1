"""Contexts, which are groups of classes that often occur together (§3.2 of the paper), and the context of an image.

All functions take tensors and return tensors on the CPU. They run once per epoch on label matrices and compute in
float64.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import spectral_clustering
from torch import Tensor

from cbsa_lightning.errors import ConfigError, DataError, listed

Assignment = Literal["cluster_qr", "kmeans"]


def cooccurrence(labels: Tensor, weights: Tensor | None = None, power: float = 1.0) -> Tensor:
    """Returns the co-occurrence matrix ``S_kl = (e_kl / n_kl) ** power``.

    ``e_kl`` is the number of images with both classes, and ``n_kl`` is the number of images with class k whose label
    for class l is known. Without unknown entries, this is the paper's ``e_kl / n_k``. (The paper counts images with
    "only the k-th label" in ``n_k``, which can lead to a division by zero; the work that it follows counts all images
    with class k.) If the unknown entries are a random subset, ``S_kl`` still estimates the fraction of the images of
    class k that have class l. ``S_kl`` is 0 if ``n_kl`` is 0. The diagonal is 1 for every class that is present;
    :func:`partition` ignores it.

    Args:
        labels: ``(n, C)`` in {1, 0, -1 unknown}, any integer type, any device.
        weights: ``(n,)`` weight of each image, >= 0; 1 by default.
        power: 1 for the paper's ratio, 0.5 for its square root (CPSD).

    Returns:
        ``(C, C)`` float64, on the CPU.

    Raises:
        DataError: If the labels are not a matrix, or the weights do not fit them.
        ConfigError: If the power is not positive.
    """
    if labels.ndim != 2:
        raise DataError(f"co-occurrence: labels must be (n, C), got {tuple(labels.shape)}")
    if not power > 0:
        raise ConfigError(f"co-occurrence: power must be positive, got {power}")
    if weights is None:
        weights = torch.ones(len(labels)).float()
    weights = weights.detach().cpu().double()
    if weights.shape != (len(labels),) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError(f"co-occurrence: {len(labels)} images need one finite weight >= 0 each")
    both = torch.zeros(labels.shape[1], labels.shape[1], dtype=torch.float64)
    counts = torch.zeros_like(both)
    for start in range(0, len(labels), _ROWS):
        rows = slice(start, start + _ROWS)
        present, known = (labels[rows] == 1).cpu().double(), (labels[rows] >= 0).cpu().double()
        weighted = (present * weights[rows, None]).T
        both += weighted @ present
        counts += weighted @ known
    return torch.where(counts > 0, both / counts, 0.0) ** power


def partition(S: Tensor, num_contexts: int, assign: Assignment = "cluster_qr", seed: int = 0) -> Tensor:
    """Splits the classes into contexts by a normalized cut of ``P = (S + S^T) / 2`` (Eq. 9-10).

    The degrees are computed from P, and its diagonal is ignored, because D - P is not a Laplacian if the paper's
    equations are taken literally. Contexts are numbered by their first class. ``cluster_qr`` is deterministic and does
    not depend on the order of the classes; ``kmeans`` depends on ``seed``.

    A class that never occurs together with another one joins the context with the largest volume (sum of degrees). If
    the other classes form ``num_contexts`` or more disconnected groups, cuts between these groups have no cost. The
    groups with the largest volume then become the contexts, and the other groups join the largest one.

    Args:
        S: ``(C, C)`` co-occurrence matrix, finite, >= 0.
        num_contexts: K, between 1 and C.
        assign: method that turns the spectral embedding into groups: scikit-learn's ``cluster_qr`` or ``kmeans``.
        seed: seed of the eigensolver's initial vector and of k-means.

    Returns:
        ``(C,)`` int64 context ids in [0, K), on the CPU; each id is used.

    Raises:
        DataError: If the matrix is not square, finite and non-negative.
        ConfigError: If K is not between 1 and C, or too few classes ever occur together.
    """
    matrix = S.detach().cpu().double().numpy()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise DataError(f"partition: the co-occurrence matrix must be square, got {matrix.shape}")
    wrong = ~(np.isfinite(matrix) & (matrix >= 0))
    if wrong.any():
        where = [f"({k}, {other}): {matrix[k, other]}" for k, other in np.argwhere(wrong)]
        raise DataError(f"partition: co-occurrences must be finite and >= 0; {listed(where)}")
    num_classes = len(matrix)
    if not 1 <= num_contexts <= num_classes:
        raise ConfigError(f"partition: num_contexts must be between 1 and {num_classes} classes, got {num_contexts}")
    if num_contexts == 1:
        return torch.zeros(num_classes, dtype=torch.int64)

    affinity = (matrix + matrix.T) / 2
    np.fill_diagonal(affinity, 0.0)
    degree = affinity.sum(axis=1)
    linked = np.flatnonzero(degree > 0)
    if len(linked) < num_contexts:
        raise ConfigError(
            f"only {len(linked)} of {num_classes} classes ever occur together with another one, "
            f"too few for {num_contexts} contexts; lower num_contexts or label more images"
        )
    groups = np.full(num_classes, -1)
    groups[linked] = _normalized_cut(affinity[np.ix_(linked, linked)], num_contexts, assign, seed)
    volume = np.bincount(groups[linked], weights=degree[linked], minlength=num_contexts)
    groups[groups < 0] = volume.argmax()
    return torch.from_numpy(_by_first_class(groups))


def context_targets(
    labels: Tensor, partition: Tensor, num_contexts: int | None = None, frequency: Tensor | None = None
) -> Tensor:
    """Returns the context that most labels of each image belong to.

    In case of a tie, the context with the rarest of the image's labels is chosen; the paper does not specify this case.

    Args:
        labels: ``(n, C)`` in {1, 0, -1 unknown}; unknown counts as absent.
        partition: ``(C,)`` context of each class.
        num_contexts: K; ids must be below it. By default, it is one more than the largest id.
        frequency: ``(C,)`` frequency of each class, in any unit. By default, it is the count of the class in
            ``labels``, so pass it if ``labels`` is only a part of the data set. If classes are equally frequent, the
            first one counts as the rarest.

    Returns:
        ``(n,)`` int64 on the CPU, -1 for an image without any label.

    Raises:
        DataError: If the shapes do not fit, or the partition has ids outside [0, K).
    """
    present, groups, num_contexts = _checked(labels, partition, num_contexts)
    num_classes = present.shape[1]
    common = present.sum(axis=0) if frequency is None else frequency.detach().cpu().double().numpy()
    if common.shape != (num_classes,):
        raise DataError(f"context targets: {num_classes} classes need one frequency each, got {common.shape}")
    rank = np.argsort(np.argsort(common, kind="stable"), kind="stable")  # 0 is the rarest class
    # One number encodes both criteria: more labels first, then the rarer class. All ranks differ, so there are no ties.
    merit = np.zeros((len(present), num_contexts), dtype=np.int64)
    for k in range(num_contexts):
        mine = present[:, groups == k]
        rarest = np.where(mine, rank[groups == k], num_classes).min(axis=1, initial=num_classes)
        merit[:, k] = mine.sum(axis=1) * (num_classes + 1) - rarest
    return torch.from_numpy(np.where(present.any(axis=1), merit.argmax(axis=1), -1))


def soft_context_targets(labels: Tensor, partition: Tensor, num_contexts: int | None = None) -> Tensor:
    """Returns the fraction of each image's labels that belongs to each context.

    Args:
        labels: ``(n, C)`` in {1, 0, -1 unknown}; unknown counts as absent.
        partition: ``(C,)`` context of each class.
        num_contexts: K; ids must be below it. By default, it is one more than the largest id.

    Returns:
        ``(n, K)`` float32 on the CPU; rows sum to 1, or are all 0 for an image without any label.

    Raises:
        DataError: If the shapes do not fit, or the partition has ids outside [0, K).
    """
    present, groups, num_contexts = _checked(labels, partition, num_contexts)
    counts = present.astype(np.float64) @ np.eye(num_contexts)[groups]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return torch.from_numpy(shares.astype(np.float32))


def match_partition(new: Tensor, old: Tensor, num_contexts: int) -> Tensor:
    """Renumbers the contexts of ``new`` so that they overlap as much as possible with those of ``old``.

    The context head has one output per id, so swapping ids between epochs would undo its training. Among equally good
    assignments, the one that keeps more ids is used.

    Args:
        new: ``(C,)`` context ids in [0, K).
        old: ``(C,)`` context ids in [0, K); entries of -1 (not set yet) are ignored.
        num_contexts: K.

    Returns:
        ``(C,)`` int64 on the CPU, with the same groups as ``new``.

    Raises:
        DataError: If the two differ in shape or have ids outside the range.
    """
    ours, theirs = new.detach().cpu().long().numpy(), old.detach().cpu().long().numpy()
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise DataError(f"partitions differ in shape: {ours.shape} and {theirs.shape}")
    if ((ours < 0) | (ours >= num_contexts) | (theirs < -1) | (theirs >= num_contexts)).any():
        raise DataError(f"partitions must have context ids below {num_contexts}, got {ours} and {theirs}")
    overlap = np.zeros((num_contexts, num_contexts), dtype=np.int64)
    np.add.at(overlap, (ours[theirs >= 0], theirs[theirs >= 0]), 1)
    # Ids that are kept add at most K in total, so they never outweigh an overlap of one class.
    rows, columns = linear_sum_assignment(overlap * (num_contexts + 1) + np.eye(num_contexts), maximize=True)
    renamed = np.empty(num_contexts, dtype=np.int64)
    renamed[rows] = columns
    return torch.from_numpy(renamed[ours])


_ROWS = 1 << 16  # images per chunk; a million images at once would need gigabytes in float64

_Ints = npt.NDArray[np.int64]


def _normalized_cut(affinity: npt.NDArray[np.float64], k: int, assign: Assignment, seed: int) -> _Ints:
    """Returns the groups of a graph in which every node has an edge, as ids in [0, k)."""
    count, component = connected_components(affinity > 0, directed=False)
    if count >= k:
        volume = np.bincount(component, weights=affinity.sum(axis=1))
        kept = np.argsort(-volume, kind="stable")[:k]
        name = np.zeros(count, dtype=np.int64)
        name[kept] = np.arange(k)
        found: _Ints = name[component]
        return found
    if k == len(affinity):
        return np.arange(k)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")  # fewer components than k are fine
        labels = spectral_clustering(affinity, n_clusters=k, assign_labels=assign, random_state=seed)
    return np.asarray(labels, dtype=np.int64)


def _by_first_class(groups: _Ints) -> _Ints:
    """Renumbers the groups in the order in which they first appear."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _checked(labels: Tensor, partition: Tensor, num_contexts: int | None) -> tuple[npt.NDArray[np.bool_], _Ints, int]:
    present = (labels == 1).cpu().numpy()
    groups = partition.detach().cpu().long().numpy()
    if present.ndim != 2 or groups.shape != present.shape[1:]:
        raise DataError(f"labels {present.shape} and partition {groups.shape} do not fit: (n, C) and (C,) are needed")
    highest = int(groups.max(initial=0)) + 1
    num_contexts = highest if num_contexts is None else num_contexts
    if (groups < 0).any() or highest > num_contexts:
        raise DataError(f"the partition must have context ids in [0, {num_contexts}), got {groups.tolist()}")
    return present, groups, num_contexts
