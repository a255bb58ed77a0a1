"""Contexts: groups of classes that occur together (§3.2 of the paper), and the context of an image.

Tensors in, CPU tensors out. Everything here runs once an epoch on label matrices, in float64.
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
    """Co-occurrence matrix ``S_kl = (e_kl / n_kl) ** power``.

    ``e_kl`` counts the images with both classes, ``n_kl`` those with class k of which l is known. Without unknown
    entries this is the paper's ``e_kl / n_k``. (The paper's "only the k-th label" would divide by zero; the work that
    it follows counts all.) With entries that are unknown at random, ``S_kl`` still estimates the share of the images
    of class k that have class l; it is 0 where ``n_kl`` is. The diagonal is kept, 1 for every class that is present;
    :func:`partition` does not look at it.

    Args:
        labels: ``(n, C)`` in {1, 0, -1 unknown}, any integer type, any device.
        weights: ``(n,)`` how much each image counts, >= 0; 1 by default.
        power: 1 for the paper's ratio, 0.5 for its square root (CPSD).

    Returns:
        ``(C, C)`` float64, on the CPU.

    Raises:
        DataError: for labels that are no matrix, or weights that do not fit.
        ConfigError: for a power that is not positive.
    """
    if labels.ndim != 2:
        raise DataError(f"co-occurrence: labels must be (n, C), got {tuple(labels.shape)}")
    if not power > 0:
        raise ConfigError(f"co-occurrence: power must be positive, got {power}")
    if weights is None:
        weights = torch.ones(len(labels)).float()
    weights = weights.detach().cpu().double()
    if weights.shape != (len(labels),) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise DataError(f"co-occurrence: {len(labels)} images need as many finite weights >= 0")
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
    """Splits the classes into contexts: normalized cut of ``P = (S + S^T) / 2`` (Eq. 9-10).

    The degrees are those of P and the diagonal is ignored: with the paper's literal forms D - P is no
    Laplacian. Ids are numbered by each context's first class. ``cluster_qr`` is deterministic and does not
    depend on the order of the classes; ``kmeans`` depends on ``seed``.

    A class that never occurs with another one says nothing about its context: it joins the context with the
    largest volume (sum of degrees), the most common one. When the rest falls into ``num_contexts`` or more
    groups without any link, every cut between groups costs nothing; then the groups with the largest volume
    are the contexts, and the other groups join the largest of them.

    Args:
        S: ``(C, C)`` co-occurrence, finite, >= 0.
        num_contexts: K, between 1 and C.
        assign: how the spectral embedding becomes groups: scikit-learn's ``cluster_qr`` or ``kmeans``.
        seed: of the eigensolver's start and of k-means.

    Returns:
        ``(C,)`` int64 context ids in [0, K), on the CPU; each id is used.

    Raises:
        DataError: for a matrix that is not square, finite and non-negative.
        ConfigError: when K does not fit the classes, or too few of them ever occur together.
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
        raise ConfigError(f"partition: num_contexts must lie between 1 and {num_classes} classes, got {num_contexts}")
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
    """The context of each image: the one that most of its labels belong to.

    A tie goes to the tied context that holds the rarest of the image's labels (the paper is silent on both).

    Args:
        labels: ``(n, C)`` in {1, 0, -1 unknown}; unknown counts as absent.
        partition: ``(C,)`` context of each class.
        num_contexts: K; ids must lie below it. By default one more than the largest id.
        frequency: ``(C,)`` how common each class is, in any unit. By default its count in ``labels``, so
            give it wherever ``labels`` is only a part of the set. Among equally rare classes the first
            counts as rarest.

    Returns:
        ``(n,)`` int64 on the CPU, -1 for an image without any label.

    Raises:
        DataError: when shapes do not fit, or the partition holds ids outside [0, K).
    """
    present, groups, num_contexts = _checked(labels, partition, num_contexts)
    num_classes = present.shape[1]
    common = present.sum(axis=0) if frequency is None else frequency.detach().cpu().double().numpy()
    if common.shape != (num_classes,):
        raise DataError(f"context targets: {num_classes} classes need as many frequencies, got {common.shape}")
    rank = np.argsort(np.argsort(common, kind="stable"), kind="stable")  # 0 is the rarest class
    # One number orders both wishes: more labels first, then the rarer class; ranks differ, so nothing ties.
    merit = np.zeros((len(present), num_contexts), dtype=np.int64)
    for k in range(num_contexts):
        mine = present[:, groups == k]
        rarest = np.where(mine, rank[groups == k], num_classes).min(axis=1, initial=num_classes)
        merit[:, k] = mine.sum(axis=1) * (num_classes + 1) - rarest
    return torch.from_numpy(np.where(present.any(axis=1), merit.argmax(axis=1), -1))


def soft_context_targets(labels: Tensor, partition: Tensor, num_contexts: int | None = None) -> Tensor:
    """The share of each image's labels that belongs to each context.

    Args:
        labels: ``(n, C)`` in {1, 0, -1 unknown}; unknown counts as absent.
        partition: ``(C,)`` context of each class.
        num_contexts: K; ids must lie below it. By default one more than the largest id.

    Returns:
        ``(n, K)`` float32 on the CPU; rows sum to 1, or are all 0 for an image without any label.

    Raises:
        DataError: when shapes do not fit, or the partition holds ids outside [0, K).
    """
    present, groups, num_contexts = _checked(labels, partition, num_contexts)
    counts = present.astype(np.float64) @ np.eye(num_contexts)[groups]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return torch.from_numpy(shares.astype(np.float32))


def match_partition(new: Tensor, old: Tensor, num_contexts: int) -> Tensor:
    """Renames the contexts of ``new`` so that they overlap most with those of ``old``.

    The context head learns one output an id: without this, ids that swap between epochs would undo it. Among
    equally good renamings one that keeps more ids is taken.

    Args:
        new: ``(C,)`` context ids in [0, K).
        old: ``(C,)`` context ids in [0, K); -1, never set, overlaps with nothing.
        num_contexts: K.

    Returns:
        ``(C,)`` int64 on the CPU: the same groups as ``new``.

    Raises:
        DataError: when the two differ in shape or hold ids outside the range.
    """
    ours, theirs = new.detach().cpu().long().numpy(), old.detach().cpu().long().numpy()
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise DataError(f"partitions differ in shape: {ours.shape} and {theirs.shape}")
    if ((ours < 0) | (ours >= num_contexts) | (theirs < -1) | (theirs >= num_contexts)).any():
        raise DataError(f"partitions must hold context ids below {num_contexts}, got {ours} and {theirs}")
    overlap = np.zeros((num_contexts, num_contexts), dtype=np.int64)
    np.add.at(overlap, (ours[theirs >= 0], theirs[theirs >= 0]), 1)
    # Kept ids add at most K in all, so they never outweigh one class of overlap.
    rows, columns = linear_sum_assignment(overlap * (num_contexts + 1) + np.eye(num_contexts), maximize=True)
    renamed = np.empty(num_contexts, dtype=np.int64)
    renamed[rows] = columns
    return torch.from_numpy(renamed[ours])


_ROWS = 1 << 16  # images at a time: a million of them would need gigabytes as float64

_Ints = npt.NDArray[np.int64]


def _normalized_cut(affinity: npt.NDArray[np.float64], k: int, assign: Assignment, seed: int) -> _Ints:
    """Groups of a graph in which every node has a link; ids in [0, k)."""
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
        warnings.filterwarnings("ignore", message="Graph is not fully connected")  # fewer groups than k: handled
        labels = spectral_clustering(affinity, n_clusters=k, assign_labels=assign, random_state=seed)
    return np.asarray(labels, dtype=np.int64)


def _by_first_class(groups: _Ints) -> _Ints:
    """The same groups, numbered in the order in which they first appear."""
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
        raise DataError(f"the partition must hold context ids in [0, {num_contexts}), got {groups.tolist()}")
    return present, groups, num_contexts
