"""Slow float64 recomputations of the losses from their definitions, one entry at a time."""

import math

import numpy as np


def asymmetric(logits, targets, gamma_pos, gamma_neg, clip):
    """Returns the loss and its gradient with respect to the logit, with constant focal weights."""
    loss, gradient = np.zeros(logits.shape), np.zeros(logits.shape)
    for place in np.ndindex(logits.shape):
        x = float(logits[place])
        p, complement = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))  # both have full relative precision
        if targets[place] == 1:
            weight = complement**gamma_pos
            loss[place] = weight * -math.log(p)
            gradient[place] = -weight * complement
        elif targets[place] == 0 and p > clip:
            weight = (p - clip) ** gamma_neg
            loss[place] = weight * -math.log(complement + clip)
            gradient[place] = weight * p * complement / (complement + clip)
    return loss, gradient


def cross_entropy(logits, targets):
    """Returns one value per image; ``targets`` are ids, with -1 for none, or rows of probabilities."""
    result = np.zeros(len(logits))
    for i, row in enumerate(logits):
        top = max(float(value) for value in row)
        log_total = top + math.log(sum(math.exp(float(value) - top) for value in row))
        for k, value in enumerate(row):
            share = float(targets[i] == k) if np.ndim(targets) == 1 else float(targets[i][k])
            result[i] += share * (log_total - float(value))
    return result
