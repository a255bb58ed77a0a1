"""SCPNet's class graph, its convolutions and its logits with loops over classes."""

from __future__ import annotations

import torch

from reference.regions import attended, cosine, table


def relation(text):
    """Returns the cosines of all pairs of class texts, ``(C, C)``."""
    return table([[cosine(one, other) for other in text] for one in text])


def graph(relation, neighbors):
    """Returns the graph: each class has weight 0.8, and its nearest neighbors have 0.2 in total.

    ``neighbors`` includes the class itself.
    """
    count = len(relation)
    result = torch.zeros(count, count, dtype=torch.float64)
    for k in range(count):
        nearest = sorted(range(count), key=lambda j: -float(relation[k, j]))[:neighbors]
        others = [j for j in nearest if j != k]
        total = sum(float(relation[k, j]) for j in others)
        for j in others:
            result[k, j] = 0.2 * float(relation[k, j]) / total
        result[k, k] = 0.8
    return result


def refine(text, graph, matrices):
    """Returns class embeddings: the text features plus the output of three graph convolutions."""
    classes = range(len(text))
    hidden = [text[k] for k in classes]
    for layer, matrix in enumerate(matrices):
        hidden = [sum(graph[k, j] * (matrix @ hidden[j]) for j in classes) for k in classes]
        if layer < len(matrices) - 1:
            hidden = [torch.where(x > 0, x, 0.2 * x) for x in hidden]
    return table([hidden[k] + text[k] for k in classes])


def logits(features, weights, embeddings, scale):
    """Returns scaled cosines ``(B, C)`` of the global feature with the class embeddings."""
    whole = [attended(image, weights, positions=True)[0] for image in features]
    return table([[scale * cosine(g, embedding) for embedding in embeddings] for g in whole])
