"""SSGRL and the systems built on it, by loops over images, classes and places, in float64."""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def decouple(features, words, w):
    """Features ``(B, C, D)`` and attention ``(B, C, R)`` of maps ``(B, D, h, w)``."""
    places = features.reshape(*features.shape[:2], -1)
    batch, dim, number = places.shape
    found = np.zeros((batch, len(words), dim))
    attention = np.zeros((batch, len(words), number))
    for b in range(batch):
        for k, word in enumerate(words):
            scores = np.zeros(number)
            for r in range(number):
                met = np.tanh((w["image.weight"] @ places[b, :, r]) * (w["word.weight"] @ word))
                scores[r] = (w["score.weight"] @ (w["mix.weight"] @ met))[0]
            shares = np.exp(scores - scores.max())
            attention[b, k] = shares / shares.sum()
            for r in range(number):
                found[b, k] += attention[b, k, r] * places[b, :, r]
    return found, attention


def spread(nodes, graph, w, steps):
    """Gated updates of ``nodes (C, d)`` of one image."""
    d = nodes.shape[1]
    gate = {name: slice(i * d, (i + 1) * d) for i, name in enumerate(("update", "reset", "candidate"))}
    for _ in range(steps):
        after = np.zeros_like(nodes)
        for k in range(len(nodes)):
            out = sum(graph[k, j] * nodes[j] for j in range(len(nodes)))
            back = sum(graph[j, k] * nodes[j] for j in range(len(nodes)))
            sent = w["message.weight"] @ np.concatenate([out, back]) + w["message.bias"]
            update = sigmoid(sent[gate["update"]] + w["gates.weight"][:d] @ nodes[k])
            reset = sigmoid(sent[gate["reset"]] + w["gates.weight"][d:] @ nodes[k])
            new = np.tanh(sent[gate["candidate"]] + w["candidate.weight"] @ (reset * nodes[k]))
            after[k] = (1 - update) * nodes[k] + update * new
        nodes = after
    return nodes


def cooccurrence(labels):
    """Share of the known positives of class i that are known positives of class j as well."""
    number = labels.shape[1]
    graph = np.zeros((number, number))
    for i in range(number):
        have = [row for row in labels if row[i] == 1]
        for j in range(number):
            if have:
                graph[i, j] = sum(row[j] == 1 for row in have) / len(have)
    return graph


def classify(own, graph, w, steps=3):
    """Logits ``(B, C)`` of decoupled features ``(B, C, d)``; ``w`` of the whole network."""
    logits = np.zeros(own.shape[:2])
    inner = {name.removeprefix("spread."): value for name, value in w.items() if name.startswith("spread.")}
    for b, nodes in enumerate(own):
        passed = spread(nodes, graph, inner, steps)
        for k in range(len(nodes)):
            merged = np.tanh(w["merge.weight"] @ np.concatenate([passed[k], nodes[k]]) + w["merge.bias"])
            logits[b, k] = w["weight"][k] @ merged + w["bias"][k]
    return logits


def mean_bce(logits, targets):
    """Mean over known entries of targets in {1, 0, -1}."""
    losses = []
    for x, t in zip(logits.flatten(), targets.flatten(), strict=True):
        if t >= 0:
            losses.append(-np.log(sigmoid(x)) if t == 1 else -np.log(1 - sigmoid(x)))
    return sum(losses) / max(len(losses), 1)


def neighbor_graph(together, threshold, share):
    """Adjacency of GCN-ML from conditional co-occurrence."""
    number = len(together)
    joined = np.zeros((number, number))
    for i in range(number):
        for j in range(number):
            joined[i, j] = i != j and together[i, j] >= threshold
    for j in range(number):
        joined[:, j] *= share / (joined[:, j].sum() + 1e-6)
    joined += np.eye(number)
    degrees = joined.sum(1)
    graph = np.zeros_like(joined)
    for i in range(number):
        for j in range(number):
            graph[i, j] = joined[j, i] / np.sqrt(degrees[i]) / np.sqrt(degrees[j])
    return graph


def graph_classifiers(features, w):
    """Logits ``(B, C)`` of maps ``(B, D, h, w)``."""

    def convolve(nodes, weight):
        return np.array([sum(w["graph"][i, j] * (weight @ node) for j, node in enumerate(nodes)) for i in range(count)])

    count = len(w["words"])
    hidden = convolve(w["words"], w["first.weight"])
    classifiers = convolve(np.where(hidden > 0, hidden, 0.2 * hidden), w["second.weight"])
    return np.array([[c @ image.reshape(len(image), -1).max(1) for c in classifiers] for image in features])
