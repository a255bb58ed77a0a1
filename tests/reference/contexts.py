"""Slow recomputations for contexts: counts with loops, and the best cut over all groupings."""

from itertools import product

import numpy as np


def cooccurrence(labels, weights=None, power=1.0):
    n, num_classes = labels.shape
    weights = np.ones(n) if weights is None else weights
    result = np.zeros((num_classes, num_classes))
    for k, other in product(range(num_classes), repeat=2):
        both = sum(w for w, row in zip(weights, labels, strict=True) if row[k] == 1 and row[other] == 1)
        alone = sum(w for w, row in zip(weights, labels, strict=True) if row[k] == 1 and row[other] >= 0)
        result[k, other] = (both / alone) ** power if alone > 0 else 0.0
    return result


def normalized_cut(matrix, groups):
    """Sums (links that leave the group) / (all its links) over the groups, for the symmetric part without diagonal."""
    affinity = (matrix + matrix.T) / 2
    np.fill_diagonal(affinity, 0.0)
    total = 0.0
    for group in np.unique(groups):
        inside = groups == group
        total += affinity[inside][:, ~inside].sum() / affinity[inside].sum()
    return total


def best_cut(matrix, num_contexts):
    """Returns the lowest normalized cut over all groupings into exactly ``num_contexts`` groups of a tiny matrix."""
    every = (np.array(g) for g in product(range(num_contexts), repeat=len(matrix)))
    return min(normalized_cut(matrix, g) for g in every if len(np.unique(g)) == num_contexts)


def targets(labels, partition, num_contexts, frequency):
    result = []
    for row in labels:
        present = [k for k, value in enumerate(row) if value == 1]
        votes = [sum(partition[k] == c for k in present) for c in range(num_contexts)]
        tied = [k for k in present if votes[partition[k]] == max(votes)]
        result.append(partition[min(tied, key=lambda k: (frequency[k], k))] if tied else -1)
    return np.array(result)
