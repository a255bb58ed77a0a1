"""Slow recomputations of the metrics, with loops over classes and entries."""

import numpy as np


def average_precision(scores, truth):
    """Returns the non-interpolated AP: the sum of precision times gain in recall over distinct scores."""
    positives = sum(int(t == 1) for t in truth)
    total, last_recall = 0.0, 0.0
    for value in sorted(set(scores.tolist()), reverse=True):
        chosen = [t for s, t in zip(scores, truth, strict=True) if s >= value and t != -1]
        hits = sum(int(t == 1) for t in chosen)
        recall = hits / positives
        if chosen:
            total += hits / len(chosen) * (recall - last_recall)
        last_recall = recall
    return total


def envelope_precision(scores, truth):
    """Returns the interpolated AP, which uses the highest precision at the same or a higher recall."""
    positives = sum(int(t == 1) for t in truth)
    points = []
    for value in sorted(set(scores.tolist()), reverse=True):
        chosen = [t for s, t in zip(scores, truth, strict=True) if s >= value and t != -1]
        hits = sum(int(t == 1) for t in chosen)
        if chosen:
            points.append((hits / positives, hits / len(chosen)))
    total, last_recall = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        total += (recall - last_recall) * max(precision for _, precision in points[i:])
        last_recall = recall
    return total


def f1(predicted, truth):
    """Returns CP, CR, CF1 and OF1 over known entries; undefined ratios are 0."""
    precisions, recalls, pooled = [], [], np.zeros(3)
    for k in range(truth.shape[1]):
        pairs = [(p, t) for p, t in zip(predicted[:, k], truth[:, k], strict=True) if t != -1]
        hits = sum(p == 1 and t == 1 for p, t in pairs)
        chosen = sum(p == 1 for p, _ in pairs)
        actual = sum(t == 1 for _, t in pairs)
        precisions.append(hits / chosen if chosen else 0.0)
        recalls.append(hits / actual if actual else 0.0)
        pooled += (hits, chosen, actual)
    hits, chosen, actual = pooled
    op, orr = hits / chosen if chosen else 0.0, hits / actual if actual else 0.0
    cp, cr = float(np.mean(precisions)), float(np.mean(recalls))
    return cp, cr, _harmonic(cp, cr), _harmonic(op, orr)


def _harmonic(a, b):
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
