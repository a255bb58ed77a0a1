"""SSGRL and the systems that extend it, with loops over images, classes and positions, in float64."""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def decouple(features, words, w):
    """Returns features ``(B, C, D)`` and attention ``(B, C, R)`` of maps ``(B, D, h, w)``."""
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
    """Returns ``nodes (C, d)`` of one image after the gated updates."""
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
    """Returns the fraction of the known positives of class i that are also known positives of class j."""
    number = labels.shape[1]
    graph = np.zeros((number, number))
    for i in range(number):
        have = [row for row in labels if row[i] == 1]
        for j in range(number):
            if have:
                graph[i, j] = sum(row[j] == 1 for row in have) / len(have)
    return graph


def classify(own, graph, w, steps=3):
    """Returns logits ``(B, C)`` of decoupled features ``(B, C, d)``; ``w`` are the weights of the network."""
    logits = np.zeros(own.shape[:2])
    inner = {name.removeprefix("spread."): value for name, value in w.items() if name.startswith("spread.")}
    for b, nodes in enumerate(own):
        passed = spread(nodes, graph, inner, steps)
        for k in range(len(nodes)):
            merged = np.tanh(w["merge.weight"] @ np.concatenate([passed[k], nodes[k]]) + w["merge.bias"])
            logits[b, k] = w["weight"][k] @ merged + w["bias"][k]
    return logits


def mean_bce(logits, targets):
    """Returns the mean loss over known entries; targets are in {1, 0, -1}."""
    losses = []
    for x, t in zip(logits.flatten(), targets.flatten(), strict=True):
        if t >= 0:
            losses.append(-np.log(sigmoid(x)) if t == 1 else -np.log(1 - sigmoid(x)))
    return sum(losses) / max(len(losses), 1)


def neighbor_graph(together, threshold, share):
    """Returns the adjacency matrix of GCN-ML from the conditional co-occurrence."""
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
    """Returns logits ``(B, C)`` of maps ``(B, D, h, w)``."""

    def convolve(nodes, weight):
        return np.array([sum(w["graph"][i, j] * (weight @ node) for j, node in enumerate(nodes)) for i in range(count)])

    count = len(w["words"])
    hidden = convolve(w["words"], w["first.weight"])
    classifiers = convolve(np.where(hidden > 0, hidden, 0.2 * hidden), w["second.weight"])
    return np.array([[c @ image.reshape(len(image), -1).max(1) for c in classifiers] for image in features])


# Terms of the systems for partial labels ---------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / max(np.linalg.norm(a), 1e-9) / max(np.linalg.norm(b), 1e-9)


def contrast(features, targets, orders):
    """Returns the contrastive loss.

    ``orders`` contains a random order of the pairs for each kind with more than one: first (+, -), then (-, -).
    """
    kinds = {"alike": [], "unlike": [], "neither": []}
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            for k in range(features.shape[1]):
                c, both = cosine(features[i, k], features[j, k]), {targets[i, k], targets[j, k]}
                if both == {1}:
                    kinds["alike"].append(1 - c)
                elif both == {0, 1}:
                    kinds["unlike"].append(1 + c)
                elif both == {0}:
                    kinds["neither"].append(1 + c)
    number = len(kinds["alike"])
    counted = list(kinds["alike"])
    for kind in ("unlike", "neither"):
        costs = kinds[kind]
        if number:
            order = orders(len(costs))
            counted += [costs[i] for i in order[: 2 * number]] + sorted(costs, reverse=True)[:number]
        else:
            counted += costs
    return sum(counted) / len(counted) if counted else 0.0


def pair_logits(features, w):
    """Returns logits ``(B, pairs)``, computed pair by pair as in the released code."""
    number, rows = features.shape[1], []
    for image in features:
        row, p = [], 0
        for i in range(number):
            for j in range(i + 1, number):
                ends = [w["project.weight"] @ image[k] + w["project.bias"] for k in (i, j)]
                hidden = np.maximum(w["join.weight"] @ np.concatenate(ends) + w["join.bias"], 0)
                row.append(w["weight"][p] @ (w["mix.weight"] @ hidden + w["mix.bias"]) + w["bias"][p])
                p += 1
        rows.append(row)
    return np.array(rows)


def pair_loss(logits, targets):
    """Returns the mean loss over label pairs for targets ``(B, C)``."""
    losses = []
    for row, labels in zip(logits, targets, strict=True):
        p = 0
        for i in range(len(labels)):
            for j in range(i + 1, len(labels)):
                s = sigmoid(row[p])
                q = max(s - 0.05, 0)
                both = labels[i] == 1 and labels[j] == 1
                losses.append(-(1 - s) * np.log(s) if both else -(q**2) * np.log(1 - q))
                p += 1
    return sum(losses) / len(losses)


def given_known(logits, targets):
    """Returns the mean probability of each label given the known positives of its image."""
    found = np.zeros(targets.shape)
    number = targets.shape[1]
    place = {}
    for i in range(number):
        for j in range(i + 1, number):
            place[i, j] = place[j, i] = len(place) // 2
    for b, labels in enumerate(targets):
        have = [j for j in range(number) if labels[j] == 1]
        for k in range(number):
            probabilities = [1.0 if j == k else sigmoid(logits[b, place[k, j]]) for j in have]
            found[b, k] = sum(probabilities) / max(len(have), 1)
    return found


def mean_cosine(features, examples):
    return np.array([[np.mean([cosine(f, e) for e in examples[k]]) for k, f in enumerate(image)] for image in features])


def soft_bce(logits, targets, counted):
    """Returns the mean loss of soft targets over counted entries."""
    p, targets = sigmoid(logits), targets * 1.0
    losses = -targets * np.log(p) - (1 - targets) * np.log(1 - p)
    return losses[counted].mean() if counted.any() else 0.0


def blended(features, targets, others, chosen, share, classify):
    """Returns the loss if the features of chosen labels are blended with those of ``others``."""
    mixed, soft = features.copy(), (targets == 1) * 1.0
    for b, k in zip(*np.nonzero(chosen), strict=True):
        mixed[b, k] = share * features[b, k] + (1 - share) * others[b, k]
        soft[b, k] = 1 - share
    return soft_bce(classify(mixed), soft, (targets >= 0) | chosen)


def maps_of(features, attention):
    """Returns maps ``(B, h, w, C, D)``, which are attention times features, and the quadrants of their peaks."""
    batch, dim, rows, columns = features.shape
    number = attention.shape[1]
    maps, quadrants = np.zeros((batch, rows, columns, number, dim)), np.zeros((batch, number), dtype=int)
    for b in range(batch):
        for k in range(number):
            best = -np.inf
            for i in range(rows):
                for j in range(columns):
                    maps[b, i, j, k] = attention[b, k].reshape(rows, columns)[i, j] * features[b, :, i, j]
                    if maps[b, i, j, k].sum() > best:
                        best = maps[b, i, j, k].sum()
                        quadrants[b, k] = 2 * (i >= rows // 2) + (j >= columns // 2)
    return maps, quadrants


def map_prototypes(maps, quadrants, targets):
    """Returns mean maps ``(C, 4, h, w, D)`` of the positives in each quadrant, or of all positives if it has none."""
    number = targets.shape[1]
    found = np.zeros((number, 4, *maps.shape[1:3], maps.shape[4]))
    for k in range(number):
        for quadrant in range(4):
            own = [b for b in range(len(maps)) if targets[b, k] == 1]
            here = [b for b in own if quadrants[b, k] == quadrant]
            if own:
                found[k, quadrant] = np.mean([maps[b, :, :, k] for b in here or own], axis=0)
    return found
