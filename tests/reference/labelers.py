"""Slow recomputations of the labelers: one class and one entry at a time, with counts as exact fractions."""

from fractions import Fraction

import numpy as np


def thresholds(scores, positives, known, eta_pos, eta_neg):
    """Returns thresholds if ``positives[k]`` of ``known[k]`` labeled entries are positive; etas are decimal strings."""
    n, num_classes = scores.shape
    tau_pos, tau_neg = [], []
    for k in range(num_classes):
        rate = Fraction(int(positives[k]), int(known[k]))
        r_pos = int(Fraction(eta_pos) * rate * n)
        r_neg = int(Fraction(eta_neg) * (1 - rate) * n)
        column = sorted(float(value) for value in scores[:, k])
        tau_pos.append(column[n - r_pos] if r_pos else np.inf)
        tau_neg.append(column[r_neg - 1] if r_neg else -np.inf)
    return np.array(tau_pos, dtype=np.float32), np.array(tau_neg, dtype=np.float32)


def label(scores, tau_pos, tau_neg):
    result = np.full(scores.shape, -1, dtype=np.int8)
    for i, k in np.ndindex(scores.shape):
        if scores[i, k] >= tau_pos[k]:
            result[i, k] = 1
        elif scores[i, k] <= tau_neg[k]:
            result[i, k] = 0
    return result


def top(scores, k):
    result = np.zeros(scores.shape, dtype=np.int8)
    for i, row in enumerate(scores):
        for best in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]:
            result[i, best] = 1
    return result
